import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from uc_adapters.layers import average_pool, cells_to_raster, raster_to_cells

STRIDES = st.integers(1, 4)
SIDES = st.integers(1, 4)  # of the grid of cells
WIDTHS = st.lists(st.integers(1, 3), max_size=2)


def numbered(batch: int, count: int, *rest: int) -> torch.Tensor:
    return torch.arange(batch * count * torch.Size(rest).numel()).view(batch, count, *rest)


def test_cells_and_sub_positions_are_in_raster_order():
    grid = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]])
    cells = raster_to_cells(grid.view(1, 16), 2)
    assert cells.tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]


@given(stride=STRIDES, side=SIDES, batch=st.integers(1, 3), rest=WIDTHS)
def test_grouping_into_cells_is_undone_exactly(stride, side, batch, rest):
    raster = numbered(batch, (side * stride) ** 2, *rest)
    cells = raster_to_cells(raster, stride)
    assert cells.shape == (batch, side**2, stride**2, *rest)
    assert torch.equal(cells_to_raster(cells, stride), raster)


@given(stride=STRIDES, side=SIDES, batch=st.integers(1, 3), rest=WIDTHS)
def test_ungrouping_is_undone_exactly(stride, side, batch, rest):
    cells = numbered(batch, side**2, stride**2, *rest)
    assert torch.equal(raster_to_cells(cells_to_raster(cells, stride), stride), cells)


@given(stride=STRIDES, side=SIDES, width=st.integers(1, 5), seed=st.integers(0, 99))
def test_average_pool_is_torchs(stride, side, width, seed):
    dense = torch.randn(2, (side * stride) ** 2, width, generator=torch.Generator().manual_seed(seed))
    grid = dense.transpose(1, 2).unflatten(2, (side * stride, side * stride))
    expected = F.avg_pool2d(grid, stride).flatten(2).transpose(1, 2)
    torch.testing.assert_close(average_pool(dense, stride), expected)


def test_stride_one_pools_nothing():
    dense = torch.randn(2, 9, 3)
    assert torch.equal(average_pool(dense, 1), dense)
