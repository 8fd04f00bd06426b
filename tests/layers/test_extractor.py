import pytest
import torch

from uc_adapters.layers import GlobalExtractor


@pytest.mark.parametrize(("in_width", "width"), [(8, 64), (64, 64)])
@pytest.mark.parametrize("count", [1, 4])
def test_shape(in_width, width, count):
    extractor = GlobalExtractor(in_width, width, count, 16)
    assert extractor(torch.randn(3, 16, in_width)).shape == (3, count, in_width)


def test_dense_tokens_are_only_read():
    dense = torch.randn(2, 16, 8)
    before = dense.clone()
    GlobalExtractor(8, 16, 2, 16)(dense)
    assert torch.equal(dense, before)


def test_every_dense_token_counts():
    extractor = GlobalExtractor(8, 16, 2, 16)
    dense = torch.randn(1, 16, 8, requires_grad=True)
    extractor(dense).square().sum().backward()
    assert (dense.grad.abs().sum(-1) > 0).all()


def test_the_place_of_a_dense_token_counts():
    extractor = GlobalExtractor(8, 16, 2, 16)
    dense = torch.randn(1, 16, 8)
    assert not torch.allclose(extractor(dense), extractor(dense.flip(1)))


def test_global_tokens_differ_from_each_other_at_the_start():
    tokens = GlobalExtractor(64, 64, 4, 16)(torch.randn(1, 16, 64))[0]
    cosines = torch.nn.functional.cosine_similarity(tokens[:, None], tokens[None], dim=-1)
    assert (cosines - torch.eye(4)).max() < 0.9
