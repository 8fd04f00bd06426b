"""The variants of `ablate.py`: the paper's ablations (UniCompress, section 4), one change each, and the way to "strip".

All axes but the last two start from "cell": inside the loop, a step draws the codes of one s x s window, after global codes as
in the paper. Modules that did not win are defined here, and not in the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from finetuning.arguments import FinetuneArguments
from torch import nn

from uc_adapters import UniCompressModel, get_uc_model
from uc_adapters.compression import make_decompressor
from uc_adapters.layers import (
    Grid,
    Positions,
    RasterDecompressor,
    StripDecompressor,
    compact_grid,
    raster_to_windows,
    windows_to_raster,
)
from uc_adapters.layers.attention import Attention


class MaxPool(nn.Module):
    """Pools each window by the maximum of each feature."""

    def __init__(self, stride: int, width: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        """(B, T, C) -> (B, T', C)."""
        return raster_to_windows(x, self.stride, grid).amax(2)  # (B, T', s^2, C) -> (B, T', C)


class StridedConv(nn.Module):
    """Pools each window by a linear map, which starts as the average."""

    def __init__(self, stride: int, width: int):
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.eye(width).repeat(stride**2, 1) / stride**2)  # (s^2 * C, C)

    def forward(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        """(B, T, C) -> (B, T', C)."""
        return raster_to_windows(x, self.stride, grid).flatten(2) @ self.weight  # (B, T', s^2 * C) -> (B, T', C)


class GatedPool(nn.Module):
    """Pools each window by a weighted mean, whose weights come from a linear gate; it starts as the average."""

    def __init__(self, stride: int, width: int):
        super().__init__()
        self.stride = stride
        self.gate = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        """(B, T, C) -> (B, T', C)."""
        windows = raster_to_windows(x, self.stride, grid)  # (B, T', s^2, C)
        shares = (windows @ self.gate).softmax(2)  # (B, T', s^2)
        return (shares.unsqueeze(-1) * windows).sum(2)


class TopK(nn.Module):
    """Keeps as many dense tokens as there are windows: those with the highest learned scores, in raster order."""

    def __init__(self, stride: int, width: int):
        super().__init__()
        self.stride = stride
        self.score = nn.Parameter(torch.randn(width) / width)

    def forward(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        """(B, T, C) -> (B, T', C)."""
        scores = x @ self.score  # (B, T)
        kept = scores.topk(x.shape[1] // self.stride**2).indices.sort().values.unsqueeze(-1)  # (B, T', 1)
        return (x * 2 * scores.sigmoid().unsqueeze(-1)).gather(1, kept.expand(-1, -1, x.shape[-1]))  # so it learns


class MeanToken(nn.Module):
    """Makes the mean of the dense tokens the only global token."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, dense: torch.Tensor, grid: Grid) -> torch.Tensor:
        """(B, T, C) -> (B, 1, C)."""
        return self.norm(dense.mean(1, keepdim=True))


class ClsToken(nn.Module):
    """Makes one global token: a learned token that attends to the dense tokens and to itself, like a CLS token."""

    def __init__(self, width: int):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.5)
        self.attention = Attention(width)
        self.norm = nn.LayerNorm(width)

    def forward(self, dense: torch.Tensor, grid: Grid) -> torch.Tensor:
        """(B, T, C) -> (B, 1, C)."""
        token = self.token.expand(len(dense), -1, -1)
        return self.norm(token + self.attention(token, self.attention.keys_values(torch.cat([token, dense], 1))))


class CellDecompressor(StripDecompressor):
    """Draws the codes of one s x s window from each hidden state, and attends to the global codes, too."""

    def __init__(
        self, lengths: tuple[int], code_width: int, width: int, out_width: int, layers: int, global_width: None = None
    ):
        super().__init__(lengths, code_width, width, out_width, layers, code_width)

    def order(self, x: torch.Tensor, grid: Grid, length: int) -> torch.Tensor:
        return raster_to_windows(x, math.isqrt(length), grid)

    def unorder(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        return windows_to_raster(x, math.isqrt(*self.lengths), grid)

    def step_positions(self, positions: Positions, grid: Grid, length: int) -> torch.Tensor:
        return positions(compact_grid(grid, math.isqrt(length))) + 1  # positions count compact tokens


class CellAtDensePlaces(CellDecompressor):
    """Each window uses the mean of its codes' positions in the base's own sequence as its position id."""

    def step_positions(self, positions: Positions, grid: Grid, length: int) -> torch.Tensor:
        of_codes = torch.arange(math.prod(grid)).view(1, -1)  # (1, T), in raster order
        of_windows = self.order(of_codes, grid, length)[0].float().mean(-1).round().long()  # (T',)
        return torch.cat([of_windows, of_windows[-1:] + 1])


class StripOfLast(StripDecompressor):
    """A step's input is the embedding of its last code, which the base would read there, and not the mean of all codes."""

    def embed(self, embeddings: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
        """(..., s^2, D) and (..., s^2, C) -> (..., D)."""
        return embeddings[..., -1, :] + self.places_in(entries.flatten(-2))


class StripOfLastAtCompactPlaces(StripOfLast):
    """Positions count compact tokens, as in "cell"."""

    step_positions = CellDecompressor.step_positions


class OneShotDecompressor(RasterDecompressor):
    """Draws all dense codes in one step, in which no code sees another."""

    def block(self, grid: Grid) -> int:
        return math.prod(grid)


Change = Callable[[UniCompressModel], None]


def read_with(make: Callable[[int, int], nn.Module], model: UniCompressModel) -> None:
    """Replaces the pooling on the reading side. `cell` has no pooling of its own on the drawing side."""
    reader = model.read_layer.active_module()
    reader.pool = make(reader.pool.stride, model.family.geometry.read_width)


def pool_drawn_with(make: Callable[[int, int], nn.Module], model: UniCompressModel) -> None:
    """Replaces the pooling on the drawing side, for a decompressor after the loop, which has one. Stage 1 trains it."""
    module = model.code_head.module
    module.pool = make(module.stride, model.family.geometry.code_width)


def summarise_with(make: Callable[[int], nn.Module], model: UniCompressModel) -> None:
    """Replaces the global tokens on the reading side and on the drawing side."""
    model.read_layer.active_module().extractor = make(model.family.geometry.read_width)
    model.code_head.module.extractor = make(model.family.geometry.code_width)


def decompress_at_once(model: UniCompressModel) -> None:
    """Replaces the T steps of `raster` by one."""
    config, geometry = model.active_peft_config, model.family.geometry
    model.code_head.module.decompressor = make_decompressor(OneShotDecompressor, config, geometry)


def draw_with(kind: type[StripDecompressor], model: UniCompressModel) -> None:
    """Replaces the decompressor inside the loop."""
    device, module = model.device, model.code_head.module
    module.decompressor = make_decompressor(kind, model.active_peft_config, model.family.geometry).to(device)


@dataclass(frozen=True)
class Variant:
    """One adapter of an ablation."""

    options: dict = field(default_factory=dict)
    """Options of `finetune.py`."""
    change: Change | None = None
    """A change of the new adapter, if no option makes it."""
    after_stage_1: Change | None = None
    """A change of the adapter between the stages."""

    def attach(self, base: nn.Module) -> UniCompressModel:
        """Attaches a new adapter of this variant to a base."""
        model = get_uc_model(base, FinetuneArguments(**self.options).config())
        if self.change is not None:
            self.change(model)
        return model

    def begin_stage_2(self, model: UniCompressModel) -> None:
        """Makes the change between the stages, if there is one."""
        if self.after_stage_1 is not None:
            self.after_stage_1(model)


def cell(change: Change | None = None, kind: type[CellDecompressor] = CellDecompressor, **options) -> Variant:
    """An adapter with a `CellDecompressor`. Stage 1 trains its global codes with "phase", which is then replaced."""
    return Variant({"decompressor": "phase", **options}, change, partial(draw_with, kind))


def strip(change: Change | None = None, **options) -> Variant:
    """An adapter with "strip"."""
    return Variant({"decompressor": "strip", **options}, change)


def strip_of_last(**options) -> Variant:
    """An adapter with `StripOfLast`: the input of a step is its last code alone."""
    return strip(partial(draw_with, StripOfLast), **options)


START = cell()
DENSE = strip(stride=1, num_global_tokens=0)  # a step draws one of the base's own codes
PAPER = Variant({"decompressor": "raster"})
TAUGHT = strip(distill=True)
AXES: dict[str, dict[str, Variant]] = {
    "global tokens": {
        "0": cell(num_global_tokens=0),
        "1": cell(num_global_tokens=1),
        "4": START,
        "8": cell(num_global_tokens=8),
    },
    "kind of global token": {
        "mean token": cell(partial(summarise_with, MeanToken), num_global_tokens=1),
        "CLS-like token": cell(partial(summarise_with, ClsToken), num_global_tokens=1),
        "4 meta queries": START,
    },
    "pooling of what is read": {
        "average": START,
        "max": cell(partial(read_with, MaxPool)),
        "strided conv": cell(partial(read_with, StridedConv)),
        "gated": cell(partial(read_with, GatedPool)),
        "top-k selection": cell(partial(read_with, TopK)),
    },
    "stride": {
        "1, no global tokens": DENSE,
        "2": START,
        "4": cell(stride=4),
    },
    "decompressor": {
        "raster": PAPER,
        "phase": Variant({"decompressor": "phase"}),
        "one-shot": Variant({"decompressor": "raster"}, decompress_at_once),
        "cell": START,
    },
    "LoRA rank": {
        "8": cell(r=8, lora_alpha=8),
        "16": cell(r=16, lora_alpha=16),
        "64": START,
    },
    "drawing": {
        "the dense base, trained as long": DENSE,
        "raster, the paper's path": PAPER,
        "raster, strided conv in place of the average": Variant(PAPER.options, partial(pool_drawn_with, StridedConv)),
        "cell": START,
        "cell, no global codes, at the dense places": cell(kind=CellAtDensePlaces, num_global_tokens=0),
        "strip of the last code, at the compact places": strip(partial(draw_with, StripOfLastAtCompactPlaces)),
        "strip of the last code": strip_of_last(),
        "strip": strip(),
        "strip of the last code, one layer": strip_of_last(decompressor_layers=1),
        "strip of the last code, taught": strip_of_last(distill=True),
        "strip, taught": TAUGHT,
        "strip, taught, three layers": strip(distill=True, decompressor_layers=3),
        "strip, taught, twice as wide": strip(distill=True, decompressor_width=384),
        "strip, taught, rank 16": strip(distill=True, r=16, lora_alpha=16),
        "strip, taught, rank 32": strip(distill=True, r=32, lora_alpha=32),
        "strip of the last code, taught, one layer": strip_of_last(distill=True, decompressor_layers=1),
        "strip of the last code, taught, rank 8": strip_of_last(distill=True, r=8, lora_alpha=8),
        "strip of the last code, taught, LoRA on attention alone": strip_of_last(
            distill=True, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
        ),
    },
    "codes in a step": {
        "cell": START,
        "2": strip(distill=True, codes_per_step=2),
        "4": TAUGHT,
        "4, global tokens": strip(distill=True, codes_per_step=4, drawing_global_tokens=True),
        "8": strip(distill=True, codes_per_step=8),
        "8, global tokens": strip(distill=True, codes_per_step=8, drawing_global_tokens=True),
        "8, four layers": strip(distill=True, codes_per_step=8, decompressor_layers=4),
        "16": strip(distill=True, codes_per_step=16),
        "4 of 1, 2, 4, 8 and 16": strip(distill=True, codes_per_step=[1, 2, 4, 8, 16]),
    },
}
"""The variants by name, for each axis by name. A variant on several axes is trained once; `START` is on every axis."""
