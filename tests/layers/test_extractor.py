import pytest
import torch

from uc_adapters.layers import GlobalExtractor

SIDE = 4  # of the square that positions are learned on
each_grid = pytest.mark.parametrize("grid", [(4, 4), (2, 2), (2, 8), (6, 3), (1, 5)], ids=str)


def tokens(grid: tuple[int, int], batch: int = 1, width: int = 8) -> torch.Tensor:
    return torch.randn(batch, grid[0] * grid[1], width)


@each_grid
@pytest.mark.parametrize(("in_width", "width"), [(8, 64), (64, 64)])
@pytest.mark.parametrize("count", [1, 4])
def test_shape(in_width, width, count, grid):
    extractor = GlobalExtractor(in_width, width, count, SIDE)
    assert extractor(tokens(grid, 3, in_width), grid).shape == (3, count, in_width)


@each_grid
def test_dense_tokens_are_only_read(grid):
    dense = tokens(grid, 2)
    before = dense.clone()
    GlobalExtractor(8, 16, 2, SIDE)(dense, grid)
    assert torch.equal(dense, before)


@each_grid
def test_every_dense_token_counts(grid):
    extractor = GlobalExtractor(8, 16, 2, SIDE)
    dense = tokens(grid).requires_grad_()
    extractor(dense, grid).square().sum().backward()
    assert (dense.grad.abs().sum(-1) > 0).all()


@each_grid
def test_the_place_of_a_dense_token_counts(grid):
    extractor = GlobalExtractor(8, 16, 2, SIDE)
    dense = tokens(grid)
    assert not torch.allclose(extractor(dense, grid), extractor(dense.flip(1), grid))


@pytest.mark.parametrize(("grid", "other"), [((4, 4), (2, 8)), ((2, 8), (8, 2)), ((3, 6), (6, 3))])
def test_the_shape_of_the_grid_counts(grid, other):
    extractor = GlobalExtractor(8, 16, 2, SIDE)
    dense = tokens(grid)
    assert not torch.allclose(extractor(dense, grid), extractor(dense, other))


@each_grid
def test_every_learned_position_learns(grid):
    if 2 * min(grid) < SIDE:
        pytest.skip("less than half as long as the square: bilinear skips some")
    extractor = GlobalExtractor(8, 16, 2, SIDE)
    extractor(tokens(grid), grid).square().sum().backward()
    assert (extractor.dense_positions.grad.abs().sum(-1) > 0).all()


@each_grid
def test_images_of_a_batch_do_not_see_each_other(grid):
    extractor = GlobalExtractor(8, 16, 2, SIDE)
    dense = tokens(grid, 3)
    together = extractor(dense, grid)
    for row in range(3):
        torch.testing.assert_close(extractor(dense[row : row + 1], grid)[0], together[row])


@each_grid
def test_global_tokens_differ_from_each_other_at_the_start(grid):
    globals_ = GlobalExtractor(64, 64, 4, SIDE)(tokens(grid, 1, 64), grid)[0]
    cosines = torch.nn.functional.cosine_similarity(globals_[:, None], globals_[None], dim=-1)
    assert (cosines - torch.eye(4)).max() < 0.9
