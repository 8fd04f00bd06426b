import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from uc_adapters.errors import InputError
from uc_adapters.layers import average_pool, compact_grid, raster_to_windows, windows_to_raster

STRIDES = st.integers(1, 4)
LENGTHS = st.integers(1, 4)  # of a row of cells, and of a column
WIDTHS = st.lists(st.integers(1, 3), max_size=2)


def numbered(batch: int, count: int, *rest: int) -> torch.Tensor:
    return torch.arange(batch * count * torch.Size(rest).numel()).view(batch, count, *rest)


def test_cells_and_sub_positions_are_in_raster_order():
    grid = torch.tensor([[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17], [18, 19, 20, 21, 22, 23]])
    cells = raster_to_windows(grid.view(1, 24), 2, (4, 6))
    above, below = [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]], [[12, 13, 18, 19], [14, 15, 20, 21], [16, 17, 22, 23]]
    assert cells.tolist() == [above + below]


@given(stride=STRIDES, rows=LENGTHS, columns=LENGTHS)
def test_the_compact_grid_is_the_dense_one_divided(stride, rows, columns):
    assert compact_grid((rows * stride, columns * stride), stride) == (rows, columns)


@given(stride=STRIDES, rows=LENGTHS, columns=LENGTHS, batch=st.integers(1, 3), rest=WIDTHS)
def test_grouping_into_cells_is_undone_exactly(stride, rows, columns, batch, rest):
    grid = (rows * stride, columns * stride)
    raster = numbered(batch, rows * columns * stride**2, *rest)
    cells = raster_to_windows(raster, stride, grid)
    assert cells.shape == (batch, rows * columns, stride**2, *rest)
    assert torch.equal(windows_to_raster(cells, stride, grid), raster)


@given(stride=STRIDES, rows=LENGTHS, columns=LENGTHS, batch=st.integers(1, 3), rest=WIDTHS)
def test_ungrouping_is_undone_exactly(stride, rows, columns, batch, rest):
    grid = (rows * stride, columns * stride)
    cells = numbered(batch, rows * columns, stride**2, *rest)
    assert torch.equal(raster_to_windows(windows_to_raster(cells, stride, grid), stride, grid), cells)


@given(stride=STRIDES, rows=LENGTHS, columns=LENGTHS, width=st.integers(1, 5), seed=st.integers(0, 99))
def test_average_pool_is_torchs(stride, rows, columns, width, seed):
    grid = (rows * stride, columns * stride)
    dense = torch.randn(2, rows * columns * stride**2, width, generator=torch.Generator().manual_seed(seed))
    expected = F.avg_pool2d(dense.transpose(1, 2).unflatten(2, grid), stride).flatten(2).transpose(1, 2)
    torch.testing.assert_close(average_pool(dense, stride, grid), expected)


def test_stride_one_pools_nothing():
    dense = torch.randn(2, 12, 3)
    assert torch.equal(average_pool(dense, 1, (3, 4)), dense)


@given(stride=st.integers(2, 5), rows=st.integers(1, 12), columns=st.integers(1, 12))
def test_a_grid_that_the_stride_does_not_divide_is_refused(stride, rows, columns):
    assume(rows % stride or columns % stride)
    with pytest.raises(InputError, match=rf"{rows} x {columns} tokens; .*stride {stride} .*processor"):
        compact_grid((rows, columns), stride)


@pytest.mark.parametrize("grid", [(3, 4), (4, 3), (1, 12)])
@pytest.mark.parametrize(
    ("layer", "shape"), [(raster_to_windows, (1, 12)), (average_pool, (1, 12, 2)), (windows_to_raster, (1, 3, 4))]
)
def test_every_layer_refuses_such_a_grid(layer, shape, grid):
    with pytest.raises(InputError, match=f"{grid[0]} x {grid[1]} tokens.*stride 2"):
        layer(torch.zeros(shape), 2, grid)
