"""What `ablate.py` varies: the paper's ablations (UniCompress, section 4), one change each; and the way to "strip", by steps.

All axes but "drawing" start from "cell": inside the loop, a step draws the codes of one s x s window, after global codes as in
the paper. Modules that did not win are not in the package; they live here.
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
    RasterDecompressor,
    StripDecompressor,
    compact_grid,
    raster_to_windows,
    windows_to_raster,
)
from uc_adapters.layers.attention import Attention


class MaxPool(nn.Module):
    """The largest of each window, feature by feature."""

    def __init__(self, stride: int, width: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        """(B, T, C) -> (B, T', C)."""
        return raster_to_windows(x, self.stride, grid).amax(2)  # (B, T', s^2, C) -> (B, T', C)


class StridedConv(nn.Module):
    """A linear map of each window; starts as the average."""

    def __init__(self, stride: int, width: int):
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.eye(width).repeat(stride**2, 1) / stride**2)  # (s^2 * C, C)

    def forward(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        return raster_to_windows(x, self.stride, grid).flatten(2) @ self.weight  # (B, T', s^2 * C) -> (B, T', C)


class GatedPool(nn.Module):
    """A mean whose weights a linear gate gives; starts as the average."""

    def __init__(self, stride: int, width: int):
        super().__init__()
        self.stride = stride
        self.gate = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        cells = raster_to_windows(x, self.stride, grid)  # (B, T', s^2, C)
        shares = (cells @ self.gate).softmax(2)  # (B, T', s^2)
        return (shares.unsqueeze(-1) * cells).sum(2)


class TopK(nn.Module):
    """As many tokens of the dense grid as there are windows, those of the highest learned score, in raster order."""

    def __init__(self, stride: int, width: int):
        super().__init__()
        self.stride = stride
        self.score = nn.Parameter(torch.randn(width) / width)

    def forward(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        scores = x @ self.score  # (B, T)
        kept = scores.topk(x.shape[1] // self.stride**2).indices.sort().values.unsqueeze(-1)  # (B, T', 1)
        return (x * 2 * scores.sigmoid().unsqueeze(-1)).gather(1, kept.expand(-1, -1, x.shape[-1]))  # scaled: so it learns


class MeanToken(nn.Module):
    """The mean of the dense tokens as the only global token."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, dense: torch.Tensor, grid: Grid) -> torch.Tensor:
        """(B, T, C) -> (B, 1, C)."""
        return self.norm(dense.mean(1, keepdim=True))


class ClsToken(nn.Module):
    """A learned token that attends to the dense tokens and to itself, as a CLS token in a layer of a transformer."""

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
    """Draws the codes of one s x s window from each hidden state; it attends to the global codes, too."""

    def __init__(self, stride: int, code_width: int, width: int, out_width: int, layers: int):
        super().__init__(stride, code_width, width, out_width, layers)
        self.global_in = nn.Linear(code_width, width)

    def order(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        return raster_to_windows(x, self.stride, grid)

    def unorder(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        return windows_to_raster(x, self.stride, grid)

    def position_deltas(self, grid: Grid, has_eol: bool) -> list[int]:
        return [1] * math.prod(compact_grid(grid, self.stride))  # positions count compact tokens

    def memory(self, state: torch.Tensor, globals_: torch.Tensor) -> torch.Tensor:
        return torch.cat([state, self.global_in(globals_)], 1)


class CellAtDensePlaces(CellDecompressor):
    """A window stands at the mean of its codes' places in the base's own sequence."""

    def position_deltas(self, grid: Grid, has_eol: bool) -> list[int]:
        places = torch.arange(math.prod(grid)).view(1, -1)  # (1, T), in the raster
        of_cells = self.order(places, grid)[0].float().mean(-1).round().long()  # (T',)
        return of_cells.diff(prepend=of_cells.new_zeros(1)).tolist()


class StripOfLast(StripDecompressor):
    """A step's input is the embedding of its last code, what the base would read in its place: not the mean of all."""

    def embed(self, embeddings: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
        """(..., s^2, D) and (..., s^2, C) -> (..., D)."""
        return embeddings[..., -1, :] + self.places_in(entries.flatten(-2))


class StripOfLastAtCompactPlaces(StripOfLast):
    """Positions count compact tokens, as those of "cell" do."""

    position_deltas = CellDecompressor.position_deltas


class OneShotDecompressor(RasterDecompressor):
    """All dense codes in one step, none seeing another."""

    def block(self, grid: Grid) -> int:
        return math.prod(grid)


Change = Callable[[UniCompressModel], None]


def read_with(make: Callable[[int, int], nn.Module], model: UniCompressModel) -> None:
    """Another pooling of what is read. `cell` has no pooling of its own in what is drawn."""
    reader = model.read_layer.active_module()
    reader.pool = make(reader.pool.stride, model.family.geometry.read_width)


def pool_drawn_with(make: Callable[[int, int], nn.Module], model: UniCompressModel) -> None:
    """Another pooling of what is drawn, where a decompressor after the loop has one. Stage 1 trains it."""
    module = model.code_head.module
    module.pool = make(module.stride, model.family.geometry.code_width)


def summarise_with(make: Callable[[int], nn.Module], model: UniCompressModel) -> None:
    """Another global token, of what is read and of what is drawn."""
    model.read_layer.active_module().extractor = make(model.family.geometry.read_width)
    model.code_head.module.extractor = make(model.family.geometry.code_width)


def decompress_at_once(model: UniCompressModel) -> None:
    """One step, in the place of `raster`'s T."""
    config, geometry = model.active_peft_config, model.family.geometry
    model.code_head.module.decompressor = make_decompressor(OneShotDecompressor, config, geometry)


def draw_with(kind: type[StripDecompressor], model: UniCompressModel) -> None:
    """Another decompressor inside the loop."""
    device, module = model.device, model.code_head.module
    module.decompressor = make_decompressor(kind, model.active_peft_config, model.family.geometry).to(device)


@dataclass(frozen=True)
class Variant:
    """One adapter."""

    options: dict = field(default_factory=dict)
    """Of `finetune.py`."""
    change: Change | None = None
    """Of a fresh adapter, where no option does it."""
    after_stage_1: Change | None = None
    """Of the adapter between the stages."""

    def attach(self, base: nn.Module) -> UniCompressModel:
        """A fresh adapter of it on a base."""
        model = get_uc_model(base, FinetuneArguments(**self.options).config())
        if self.change is not None:
            self.change(model)
        return model

    def begin_stage_2(self, model: UniCompressModel) -> None:
        """Makes the change between the stages."""
        if self.after_stage_1 is not None:
            self.after_stage_1(model)


def cell(change: Change | None = None, kind: type[CellDecompressor] = CellDecompressor, **options) -> Variant:
    """An adapter with a `CellDecompressor`. Its global codes learn in stage 1 with "phase", which is then replaced."""
    return Variant({"decompressor": "phase", **options}, change, partial(draw_with, kind))


def strip(change: Change | None = None, **options) -> Variant:
    """An adapter with "strip"."""
    return Variant({"decompressor": "strip", **options}, change)


def strip_of_last(**options) -> Variant:
    """One whose steps read their last code alone."""
    return strip(partial(draw_with, StripOfLast), **options)


START = cell()
DENSE = strip(stride=1, num_global_tokens=0)  # a step draws one of the base's own codes
PAPER = Variant({"decompressor": "raster"})
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
        "strip, taught": strip(distill=True),
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
}
"""What is varied: by its name, the variants by theirs. One that stands on several axes is trained once; `START` is on all."""
