import pytest
import torch
from helpers import DECOMPRESSORS
from hypothesis import given, settings
from hypothesis import strategies as st

from uc_adapters.compression import DECOMPRESSOR_CLASSES
from uc_adapters.layers import (
    PhaseDecompressor,
    RasterDecompressor,
    StripDecompressor,
    unit,
    windows_to_raster,
)

CODES, CODE_WIDTH, OUT_WIDTH = 23, 4, 12
SHAPE = {"code_width": CODE_WIDTH, "width": 16, "out_width": OUT_WIDTH}

geometries = given(
    stride=st.integers(1, 3),
    cells=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    side=st.integers(1, 3),
    count=st.integers(0, 3),
    layers=st.integers(1, 2),
    seed=st.integers(0, 99),
)
SMALL = {"stride": 2, "cells": (2, 2), "side": 2, "layers": 1, "seed": 0}
few = settings(max_examples=15)
each = pytest.mark.parametrize("kind", DECOMPRESSORS)
each_expansion = pytest.mark.parametrize("module", [PhaseDecompressor, RasterDecompressor])


class Case:
    """A decompressor with random weights, random conditions, and true codes in its own order.

    The image has a grid of `cells`; what positions are learned on has `side` x `side`.
    """

    def __init__(
        self, kind: str, stride: int, cells: tuple[int, int], side: int, count: int, layers: int, seed: int, batch: int = 2
    ):
        torch.manual_seed(seed)
        self.kind, self.grid = kind, (cells[0] * stride, cells[1] * stride)
        dense, compact = self.grid[0] * self.grid[1], cells[0] * cells[1]
        if kind == "strip":
            self.module = StripDecompressor((stride**2,), layers=layers, **SHAPE)
            self.length, self.block = stride**2, 1
            condition = torch.randn(batch, OUT_WIDTH)  # hidden states
        else:
            self.module = DECOMPRESSOR_CLASSES[kind](stride, side * stride, layers=layers, **SHAPE)
            self.length, self.block = dense, compact if kind == "phase" else 1
            condition = torch.randn(batch, compact, CODE_WIDTH)  # compact entries
        self.conditions = (condition, torch.randn(batch, count, CODE_WIDTH))
        self.codebook = unit(torch.randn(CODES, CODE_WIDTH))
        self.head = torch.randn(OUT_WIDTH, CODES)
        self.codes = torch.randint(CODES, (batch, self.length))  # in the order of drawing

    @property
    def of_grid(self) -> tuple:
        """The argument that decompressors after the loop take, and those inside it do not: they know the codes of one step."""
        return () if self.kind == "strip" else (self.grid,)

    def order(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.kind == "strip" else self.module.order(x, self.grid)

    def unorder(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.kind == "strip" else self.module.unorder(x, self.grid)

    @torch.no_grad()
    def features(self, codes: torch.Tensor) -> torch.Tensor:
        """Teacher-forced features of codes, both in the order of drawing."""
        return self.order(self.module(self.codebook[self.unorder(codes)], *self.conditions, *self.of_grid))

    @torch.no_grad()
    def draw(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Greedily drawn codes, the features they were picked from (both in order), and the number of steps."""
        seen = []

        def pick(features: torch.Tensor) -> torch.Tensor:
            seen.append(features)
            return (features @ self.head).argmax(-1)

        of_step = (self.length,) if self.kind == "strip" else (self.grid,)
        codes = self.order(self.module.draw(self.codebook, *self.conditions, *of_step, pick))
        return codes, torch.cat([x.unflatten(0, (len(codes), -1)) for x in seen], 1), len(seen)


@each
@few
@geometries
def test_teacher_forcing_sees_what_the_cached_drawing_saw(kind, **geometry):
    case = Case(kind, **geometry)
    codes, drawn_features, _ = case.draw()
    torch.testing.assert_close(case.features(codes), drawn_features, atol=1e-5, rtol=1e-5)


@each
@few
@geometries
def test_a_later_code_changes_no_earlier_feature(kind, **geometry):
    case = Case(kind, **geometry)
    before = case.features(case.codes)
    place = geometry["seed"] % case.length
    changed = case.codes.clone()
    changed[:, place] = (changed[:, place] + 1) % CODES
    after = case.features(changed)
    first_touched = (place // case.block + 1) * case.block  # its own block was drawn without it
    assert torch.equal(after[:, :first_touched], before[:, :first_touched])
    if first_touched < case.length:
        assert not torch.equal(after[:, first_touched:], before[:, first_touched:])


@each
def test_every_earlier_code_counts(kind):
    case = Case(kind, count=1, **SMALL)
    before = case.features(case.codes)[:, -1]
    for place in range(case.length - case.block):
        changed = case.codes.clone()
        changed[:, place] = (changed[:, place] + 1) % CODES
        assert not torch.equal(case.features(changed)[:, -1], before), place


@pytest.mark.parametrize(
    ("kind", "which"), [(kind, which) for kind in DECOMPRESSORS for which in (0, 1) if (kind, which) != ("strip", 1)]
)
def test_the_compact_tokens_and_the_global_tokens_count(kind, which):
    case = Case(kind, count=2, **SMALL)
    before = case.features(case.codes)
    case.conditions[which].add_(1)
    assert not torch.allclose(case.features(case.codes), before)


@pytest.mark.parametrize(("kind", "steps"), [("raster", 16), ("phase", 4), ("strip", 4)])
def test_number_of_steps(kind, steps):
    case = Case(kind, count=1, **SMALL)
    codes, _, count = case.draw()
    assert count == steps
    assert codes.shape == (2, case.length)


@each
def test_rows_do_not_see_each_other(kind):
    case = Case(kind, count=2, batch=3, **{**SMALL, "layers": 2})
    together, _, _ = case.draw()
    conditions = case.conditions
    for row in range(3):
        case.conditions = tuple(condition[row : row + 1] for condition in conditions)
        assert torch.equal(case.draw()[0][0], together[row])


@given(stride=st.integers(1, 3), rows=st.integers(1, 3), columns=st.integers(1, 3))
def test_a_phase_draws_one_sub_position_of_every_window(stride, rows, columns):
    module, grid = PhaseDecompressor(stride, 2 * stride, layers=1, **SHAPE), (rows * stride, columns * stride)
    sub_positions = torch.arange(stride**2).expand(1, rows * columns, -1)
    ordered = module.order(windows_to_raster(sub_positions, stride, grid), grid)
    assert ordered[0].tolist() == sorted(sub_positions.flatten().tolist())


@each_expansion
@given(stride=st.integers(1, 3), rows=st.integers(1, 3), columns=st.integers(1, 3))
def test_the_order_is_undone_exactly(module, stride, rows, columns):
    grid = (rows * stride, columns * stride)
    raster = torch.arange(2 * grid[0] * grid[1]).view(2, -1)
    module = module(stride, 2 * stride, layers=1, **SHAPE)
    assert torch.equal(module.unorder(module.order(raster, grid), grid), raster)


@each_expansion
@given(stride=st.integers(1, 3), side=st.integers(1, 3))
def test_the_grid_that_positions_were_learned_on_gets_them_as_they_are(module, stride, side):
    module = module(stride, side * stride, layers=1, **SHAPE)
    assert torch.equal(module.positions((side * stride, side * stride)), module.decoder.positions)


@each_expansion
def test_a_stretched_position_is_near_those_that_it_lies_between(module):
    """Each place of a grid twice as wide takes after its neighbours in the same column of the learned one."""
    module = module(2, 4, layers=1, **SHAPE)
    columns = torch.arange(4.0).expand(4, 4).flatten()  # of each place, in raster order
    with torch.no_grad():
        module.decoder.positions.copy_(module.order(columns[None], (4, 4))[0].unsqueeze(1).expand(-1, 16))
    interpolated = module.unorder(module.positions((4, 8))[None], (4, 8)).view(4, 8, 16)[..., 0]
    assert (interpolated.diff(dim=1)[:, ::2] >= 0).all()
    assert (interpolated[:, -1] > interpolated[:, 0]).all()


@given(stride=st.integers(1, 3), rows=st.integers(1, 3), columns=st.integers(1, 3))
def test_what_each_step_draws_is_undone_exactly(stride, rows, columns):
    module, grid = StripDecompressor((stride**2,), layers=1, **SHAPE), (rows * stride, columns * stride)
    raster = torch.arange(2 * grid[0] * grid[1] * 3).view(2, -1, 3)
    steps = module.order(raster, grid, stride**2)
    assert steps.shape == (2, rows * columns, stride**2, 3)
    assert torch.equal(module.unorder(steps, grid), raster)
    assert torch.equal(module.order(module.unorder(steps, grid), grid, stride**2), steps)


@given(stride=st.integers(1, 3), rows=st.integers(1, 3), columns=st.integers(1, 3))
def test_strips_cut_the_raster_and_change_nothing_of_its_order(stride, rows, columns):
    module, grid = StripDecompressor((stride**2,), layers=1, **SHAPE), (rows * stride, columns * stride)
    raster = torch.arange(grid[0] * grid[1]).view(1, -1)
    assert torch.equal(module.order(raster, grid, stride**2).flatten(1), raster)


@given(stride=st.integers(1, 4), rows=st.integers(1, 5), columns=st.integers(1, 5), has_eol=st.booleans())
def test_a_strip_stands_where_its_last_code_stands_in_the_bases_own_sequence(stride, rows, columns, has_eol):
    grid = (rows * stride, columns * stride)
    base = []  # the base's own sequence: its codes by number, and where there are some, the ends of its rows
    for row in range(grid[0]):
        base += range(row * grid[1], (row + 1) * grid[1])
        base += [("end", row)] * has_eol
    code_places = torch.tensor([place for place, code in enumerate(base) if isinstance(code, int)] + [len(base)])
    module = StripDecompressor((stride**2,), layers=1, **SHAPE)
    *steps, after = module.step_positions(lambda _: code_places, grid, stride**2).tolist()
    assert [base[place] for place in steps] == [(step + 1) * stride**2 - 1 for step in range(rows * columns)]
    assert after == len(base)  # what follows the image stands where it stands in the base's


@given(length=st.integers(1, 9), rows=st.integers(1, 7), columns=st.integers(1, 7))
def test_the_last_strip_holds_what_is_left_of_a_grid(length, rows, columns):
    module, count = StripDecompressor((9, length), layers=1, **SHAPE), rows * columns
    raster = torch.arange(count).view(1, -1)
    strips = module.order(raster, (rows, columns), length)
    assert strips.shape == (1, -(-count // length), length)
    assert torch.equal(module.unorder(strips, (rows, columns)), raster)
    *steps, after = module.step_positions(lambda _: torch.arange(count + 1), (rows, columns), length).tolist()
    assert (len(steps), steps[-1], after) == (strips.shape[1], count - 1, count)


@each_expansion
@given(stride=st.integers(1, 3), rows=st.integers(1, 3), columns=st.integers(1, 3))
def test_compact_codes_stand_one_after_the_other(module, stride, rows, columns):
    module = module(stride, 2 * stride, layers=1, **SHAPE)
    positions = module.step_positions(lambda grid: torch.arange(grid[0] * grid[1] + 1), (rows * stride, columns * stride))
    assert positions.tolist() == list(range(1, rows * columns + 2))


def test_features_start_from_the_hidden_state():
    case = Case("strip", count=1, **SMALL)
    for weight in case.module.decoder.out.parameters():
        torch.nn.init.zeros_(weight)
    assert torch.equal(case.features(case.codes), case.conditions[0].unsqueeze(1).expand(-1, 4, -1))


def test_an_untrained_steps_input_is_the_mean_of_its_codes_embeddings():
    module = StripDecompressor((4,), layers=1, **SHAPE)
    embeddings, entries = torch.randn(3, 5, 4, OUT_WIDTH), torch.randn(3, 5, 4, CODE_WIDTH)
    assert torch.equal(module.embed(embeddings, entries), embeddings.mean(-2))


def test_a_trained_input_tells_where_a_code_stood():
    module = StripDecompressor((4,), layers=1, **SHAPE)
    torch.nn.init.normal_(module.places_in.weight)
    embeddings, entries = torch.randn(3, 4, OUT_WIDTH), torch.randn(3, 4, CODE_WIDTH)
    swapped = [1, 0, 2, 3]
    assert not torch.allclose(module.embed(embeddings, entries), module.embed(embeddings[:, swapped], entries[:, swapped]))
