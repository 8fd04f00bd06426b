"""What `ablate.py` varies: the paper's ablations (UniCompress, section 4), one change each to the default adapter.

Compressors that the package does not have, since they did not win, live here alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from uc_adapters import UniCompressModel
from uc_adapters.compression import after_loop
from uc_adapters.layers import Grid, RasterDecompressor, raster_to_cells
from uc_adapters.layers.attention import Attention


class MaxPool(nn.Module):
    """The largest of each window, feature by feature."""

    def __init__(self, stride: int, width: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        """(B, T, C) -> (B, T', C)."""
        return raster_to_cells(x, self.stride, grid).amax(2)  # (B, T', s^2, C) -> (B, T', C)


class StridedConv(nn.Module):
    """A linear map of each window; starts as the average."""

    def __init__(self, stride: int, width: int):
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.eye(width).repeat(stride**2, 1) / stride**2)  # (s^2 * C, C)

    def forward(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        return raster_to_cells(x, self.stride, grid).flatten(2) @ self.weight  # (B, T', s^2 * C) -> (B, T', C)


class GatedPool(nn.Module):
    """A mean whose weights a linear gate gives; starts as the average."""

    def __init__(self, stride: int, width: int):
        super().__init__()
        self.stride = stride
        self.gate = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        cells = raster_to_cells(x, self.stride, grid)  # (B, T', s^2, C)
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


class OneShotDecompressor(RasterDecompressor):
    """All dense codes in one step, none seeing another."""

    def block(self, grid: Grid) -> int:
        return math.prod(grid)


Change = Callable[[UniCompressModel], None]


def read_with(make: Callable[[int, int], nn.Module], model: UniCompressModel) -> None:
    """Another pooling of what is read. `cell` has no pooling of its own in what is drawn."""
    reader = model.reading.active_module()
    reader.pool = make(reader.pool.stride, model.family.geometry.read_width)


def summarise_with(make: Callable[[int], nn.Module], model: UniCompressModel) -> None:
    """Another global token, of what is read and, where global tokens are drawn, of what is drawn."""
    model.reading.active_module().extractor = make(model.family.geometry.read_width)
    if model.drawing.module.extractor is not None:
        model.drawing.module.extractor = make(model.family.geometry.code_width)


def decompress_at_once(model: UniCompressModel) -> None:
    """One step, in the place of `raster`'s T."""
    model.drawing.module.decompressor = after_loop(OneShotDecompressor, model.active_peft_config, model.family.geometry)


@dataclass(frozen=True)
class Variant:
    """One change to the default adapter."""

    options: dict = field(default_factory=dict)
    """Of `finetune.py`."""
    change: Change | None = None
    """Of a fresh adapter, where no option does it."""


DEFAULT = Variant()
AXES: dict[str, dict[str, Variant]] = {
    "global tokens": {
        "0": Variant({"num_global_tokens": 0}),
        "1": Variant({"num_global_tokens": 1}),
        "4": DEFAULT,
        "8": Variant({"num_global_tokens": 8}),
    },
    "kind of global token": {
        "mean token": Variant({"num_global_tokens": 1}, partial(summarise_with, MeanToken)),
        "CLS-like token": Variant({"num_global_tokens": 1}, partial(summarise_with, ClsToken)),
        "4 meta queries": DEFAULT,
    },
    "pooling of what is read": {
        "average": DEFAULT,
        "max": Variant(change=partial(read_with, MaxPool)),
        "strided conv": Variant(change=partial(read_with, StridedConv)),
        "gated": Variant(change=partial(read_with, GatedPool)),
        "top-k selection": Variant(change=partial(read_with, TopK)),
    },
    "stride": {
        "1, no global tokens": Variant({"stride": 1, "num_global_tokens": 0}),
        "2": DEFAULT,
        "4": Variant({"stride": 4}),
    },
    "decompressor": {
        "raster": Variant({"decompressor": "raster"}),
        "phase": Variant({"decompressor": "phase"}),
        "one-shot": Variant({"decompressor": "raster"}, decompress_at_once),
        "cell": DEFAULT,
    },
    "LoRA rank": {
        "8": Variant({"r": 8, "lora_alpha": 8}),
        "16": Variant({"r": 16, "lora_alpha": 16}),
        "64": DEFAULT,
    },
}
"""What is varied: by its name, the variants by theirs. The default adapter stands on every axis."""
