import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from uc_adapters.layers import nearest_codes, straight_through, unit

SEEDS = st.integers(0, 999)
on_the_sphere_or_not = given(seed=SEEDS, on_the_sphere=st.booleans())


def make_codebook(seed: int, on_the_sphere: bool = True, size: int = 50, width: int = 8) -> torch.Tensor:
    """Entries of length 1, or of lengths from 0.5 to 3."""
    generator = torch.Generator().manual_seed(seed)
    codebook = unit(torch.randn(size, width, generator=generator))
    return codebook if on_the_sphere else codebook * torch.empty(size, 1).uniform_(0.5, 3, generator=generator)


def make_latents(seed: int) -> torch.Tensor:
    return 3 * torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed + 1))


@on_the_sphere_or_not
def test_codes_to_entries_to_codes_is_the_identity(seed, on_the_sphere):
    codebook = make_codebook(seed, on_the_sphere)
    codes = torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(nearest_codes(codebook[codes], codebook), codes)


@on_the_sphere_or_not
def test_the_nearest_code_is_at_the_least_distance(seed, on_the_sphere):
    codebook, latents = make_codebook(seed, on_the_sphere).double(), make_latents(seed).double()
    distances = torch.cdist(latents, codebook.expand(2, -1, -1), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(nearest_codes(latents, codebook), distances.argmin(-1))


def test_an_entry_in_the_latents_direction_may_be_too_far():
    codebook = torch.tensor([[5.0, 1.0], [1.0, 0.0]])
    latent = torch.tensor([1.0, 0.2])  # in the direction of the first, next to the second
    assert nearest_codes(latent, codebook) == 1


@given(SEEDS, st.floats(0.01, 100))
def test_a_latents_length_does_not_matter_on_the_sphere(seed, length):
    codebook = make_codebook(seed)
    codes = torch.arange(50)
    assert torch.equal(nearest_codes(length * codebook[codes], codebook), codes)


@given(SEEDS)
def test_the_nearest_code_on_the_sphere_has_the_greatest_cosine(seed):
    codebook, latents = make_codebook(seed), make_latents(seed)
    cosines = F.cosine_similarity(latents.unsqueeze(2), codebook, dim=-1)
    chosen = cosines.gather(2, nearest_codes(latents, codebook).unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(chosen, cosines.max(-1).values)


@on_the_sphere_or_not
def test_straight_through_is_the_entry_forward_and_the_identity_backward(seed, on_the_sphere):
    codebook = make_codebook(seed, on_the_sphere).requires_grad_()
    x, weights = make_latents(seed).requires_grad_(), make_latents(seed + 1)
    quantised = straight_through(x, codebook)
    torch.testing.assert_close(quantised, codebook[nearest_codes(x, codebook)])
    gradient, of_codebook = torch.autograd.grad((quantised * weights).sum(), (x, codebook), allow_unused=True)
    assert torch.equal(gradient, weights)
    assert of_codebook is None
