import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from uc_adapters.layers.positions import interpolate

SIDES = st.integers(1, 6)
LENGTHS = st.integers(1, 9)  # of a row, and of a column


def ramps(rows: int, columns: int) -> torch.Tensor:
    """Positions that say where they stand: (rows * columns, 2), the row and the column of each."""
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()


@given(side=SIDES, width=st.integers(1, 4))
def test_the_same_grids_positions_are_the_very_ones(side, width):
    positions = torch.randn(side**2, width)
    assert torch.equal(interpolate(positions, side, (side, side)), positions)


@given(side=SIDES, rows=LENGTHS, columns=LENGTHS, width=st.integers(1, 4))
def test_every_token_of_another_grid_gets_a_position(side, rows, columns, width):
    assert interpolate(torch.randn(side**2, width), side, (rows, columns)).shape == (rows * columns, width)


@given(side=SIDES, rows=LENGTHS, columns=LENGTHS)
def test_equal_positions_stay_equal(side, rows, columns):
    interpolated = interpolate(torch.full((side**2, 3), 0.7), side, (rows, columns))
    torch.testing.assert_close(interpolated, torch.full((rows * columns, 3), 0.7))


@given(side=st.integers(2, 6), rows=LENGTHS, columns=LENGTHS)
def test_a_ramp_stays_one(side, rows, columns):
    down, across = interpolate(ramps(side, side), side, (rows, columns)).T.unflatten(1, (rows, columns))
    torch.testing.assert_close(down, down[:, :1].expand(-1, columns))  # a row is a row still, in raster order
    torch.testing.assert_close(across, across[:1].expand(rows, -1))
    for ramp in (down[:, 0], across[0]):
        assert (ramp.diff() >= 0).all()  # equal only beyond the outermost positions of a much larger grid
        torch.testing.assert_close(ramp + ramp.flip(0), torch.full_like(ramp, side - 1))  # in the middle, not shifted


@given(side=SIDES, rows=LENGTHS, columns=LENGTHS)
def test_a_larger_grid_has_the_same_corners(side, rows, columns):
    assume(min(rows, columns) >= side)
    square, interpolated = (ramps(side, side), interpolate(ramps(side, side), side, (rows, columns)))
    square, interpolated = square.view(side, side, 2), interpolated.view(rows, columns, 2)
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        torch.testing.assert_close(interpolated[row, column], square[row, column])


def test_a_place_between_two_positions_gets_their_mean():
    positions = torch.tensor([[0.0], [4.0], [10.0], [20.0]])  # 2 x 2
    assert interpolate(positions, 2, (2, 1)).tolist() == [[2.0], [15.0]]
    assert interpolate(positions, 2, (1, 2)).tolist() == [[5.0], [12.0]]
    assert interpolate(positions, 2, (1, 1)).tolist() == [[8.5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grid", [(3, 3), (2, 5)])
def test_the_dtype_is_kept(dtype, grid):
    assert interpolate(torch.randn(9, 2).to(dtype), 3, grid).dtype == dtype


@given(side=SIDES, rows=LENGTHS, columns=LENGTHS)
def test_every_position_learns(side, rows, columns):
    assume(2 * min(rows, columns) >= side)  # bilinear: a grid less than half as long skips some
    positions = torch.randn(side**2, 3, requires_grad=True)
    interpolate(positions, side, (rows, columns)).sum().backward()
    assert (positions.grad > 0).all()
