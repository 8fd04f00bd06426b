import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from uc_adapters.layers import nearest_codes, straight_through, unit

SEEDS = st.integers(0, 999)


def make_codebook(seed: int, size: int = 50, width: int = 8) -> torch.Tensor:
    return unit(torch.randn(size, width, generator=torch.Generator().manual_seed(seed)))


@given(SEEDS)
def test_codes_to_entries_to_codes_is_the_identity(seed):
    codebook = make_codebook(seed)
    codes = torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(nearest_codes(codebook[codes], codebook), codes)


@given(SEEDS, st.floats(0.01, 100))
def test_a_latents_length_does_not_matter(seed, length):
    codebook = make_codebook(seed)
    codes = torch.arange(50)
    assert torch.equal(nearest_codes(length * codebook[codes], codebook), codes)


@given(SEEDS)
def test_the_nearest_code_has_the_greatest_cosine(seed):
    codebook = make_codebook(seed)
    latents = 3 * torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed + 1))
    cosines = F.cosine_similarity(latents.unsqueeze(2), codebook, dim=-1)
    chosen = cosines.gather(2, nearest_codes(latents, codebook).unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(chosen, cosines.max(-1).values)


def test_straight_through_is_the_entry_forward_and_the_identity_backward():
    codebook = make_codebook(0)
    x = torch.randn(4, 8, requires_grad=True)
    weights = torch.randn(4, 8)
    quantised = straight_through(x, codebook)
    torch.testing.assert_close(quantised, codebook[nearest_codes(x, codebook)])
    (gradient,) = torch.autograd.grad((quantised * weights).sum(), x)
    (expected,) = torch.autograd.grad((unit(x) * weights).sum(), x)
    assert torch.equal(gradient, expected)
