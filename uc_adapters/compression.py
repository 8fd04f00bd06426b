"""The two modules that an adapter puts into a base: what shortens reading, and what shortens drawing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .config import UniCompressConfig
from .families import Geometry
from .layers import (
    AveragePool,
    CellDecompressor,
    CompactDecompressor,
    GlobalExtractor,
    Grid,
    PhaseDecompressor,
    RasterDecompressor,
    StripDecompressor,
    average_pool,
    nearest_codes,
    raster_to_cells,
)


class ReadCompressor(nn.Module):
    """Dense features -> {G, separator, X_cont} in the same feature space, ahead of the base's aligner."""

    tokenizer_parts = ("extractor",)

    def __init__(self, config: UniCompressConfig, geometry: Geometry):
        super().__init__()
        width, count = geometry.read_width, config.num_global_tokens
        self.pool = AveragePool(config.stride)
        self.extractor = GlobalExtractor(width, width, count, geometry.read_side) if count else None
        self.separator = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, features: torch.Tensor, grid: Grid) -> torch.Tensor:
        """(B, T, read_width) -> (B, N_g + 1 + T', read_width)."""
        parts = [self.separator.expand(len(features), 1, -1), self.pool(features, grid)]
        if self.extractor is not None:
            parts.insert(0, self.extractor(features, grid))
        return torch.cat(parts, 1)


class CodeReadCompressor(nn.Module):
    """The same where codes are read: embeddings of codes -> {G, separator, X_cont} as inputs of the language model.

    The mean of a cell's embeddings forgets which code stood where, so a linear map of the codebook entries in their places
    is added; at zero, it starts as AvgPool.
    """

    tokenizer_parts = ("extractor",)

    def __init__(self, config: UniCompressConfig, geometry: Geometry):
        super().__init__()
        width, count = geometry.read_width, config.num_global_tokens
        self.stride = config.stride
        self.extractor = GlobalExtractor(width, config.decompressor_width, count, geometry.read_side) if count else None
        self.separator = nn.Parameter(torch.randn(width) * 0.02)
        self.places_in = nn.Linear(config.stride**2 * geometry.code_width, width, bias=False)
        nn.init.zeros_(self.places_in.weight)

    def forward(self, embeddings: torch.Tensor, entries: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Embeddings (B, T, D) and entries (B, T, C) of the codes -> (B, N_g + 1 + T', D)."""
        places = self.places_in(raster_to_cells(entries, self.stride, grid).flatten(2))  # (B, T', s^2, C) -> (B, T', D)
        cells = average_pool(embeddings, self.stride, grid) + places
        parts = [self.separator.expand(len(cells), 1, -1), cells]
        if self.extractor is not None:
            parts.insert(0, self.extractor(embeddings, grid))
        return torch.cat(parts, 1)


@dataclass
class CompactCodes:
    """One batch of images of one size, as the language model draws them.

    `globals` are codes Z_g (B, N), N = 0 with "strip", else N_g. `cells` are what each further step draws: for the
    decompressors after the loop the pooled codes Z_x (B, T', 1), for those inside it dense codes (B, T', s^2). `dense` are the
    base's codes, (B, T), of a `grid` of H x W.
    """

    globals: torch.Tensor
    cells: torch.Tensor
    dense: torch.Tensor
    grid: Grid


def after_loop(kind: type[CompactDecompressor], config: UniCompressConfig, geometry: Geometry) -> CompactDecompressor:
    """A fresh decompressor that works after the language model's loop, as an adapter's config and its base shape it."""
    width, layers = config.decompressor_width, config.decompressor_layers
    return kind(config.stride, geometry.draw_side, geometry.code_width, width, geometry.hidden_size, layers)


def inside_loop(kind: type[StripDecompressor], config: UniCompressConfig, geometry: Geometry) -> StripDecompressor:
    """Likewise one that works inside the loop."""
    width, layers = config.decompressor_width, config.decompressor_layers
    return kind(config.stride, geometry.code_width, width, geometry.hidden_size, layers)


INSIDE_LOOP = {"strip": StripDecompressor, "cell": CellDecompressor}
AFTER_LOOP = {"phase": PhaseDecompressor, "raster": RasterDecompressor}


class DrawCompressor(nn.Module):
    """Latents of the base's VQ tokenizer -> compact codes, and the decompressor back to dense codes."""

    def __init__(self, config: UniCompressConfig, geometry: Geometry):
        super().__init__()
        self.stride, self.num_global_codes = config.stride, config.num_global_codes
        width, code_width, side = config.decompressor_width, geometry.code_width, geometry.draw_side
        self.pool = AveragePool(config.stride)
        self.extractor = GlobalExtractor(code_width, width, self.num_global_codes, side) if self.num_global_codes else None
        self.separator = nn.Parameter(torch.randn(geometry.hidden_size) * 0.02)
        if config.decompressor in INSIDE_LOOP:
            self.decompressor = inside_loop(INSIDE_LOOP[config.decompressor], config, geometry)
        else:
            self.decompressor = after_loop(AFTER_LOOP[config.decompressor], config, geometry)

    @property
    def in_loop(self) -> bool:
        """Whether dense codes come back inside the language model's loop."""
        return isinstance(self.decompressor, StripDecompressor)

    @property
    def tokenizer_parts(self) -> tuple[str, ...]:
        """What stage 1 trains; the rest is stage 2's."""
        return ("extractor",) if self.in_loop else ("extractor", "pool", "decompressor")

    def advances(self, grid: Grid, row_ends: bool) -> list[int]:
        """By how many positions each token of `G [IMG_SEP] X` stands behind the one before it, N + 1 + T' of them."""
        return [1] * (self.num_global_codes + 1) + self.decompressor.advances(grid, row_ends)

    def globals_of(self, latents: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Global tokens before quantisation: (B, T, C) -> (B, N_g, C)."""
        if self.extractor is None:
            return latents[:, :0]
        return self.extractor(latents.to(self.separator.dtype), grid).float()

    def compress(self, latents: torch.Tensor, codebook: torch.Tensor, grid: Grid) -> CompactCodes:
        """Latents (B, T, C) -> compact codes, with the base's codebook (K, C)."""
        dense = nearest_codes(latents, codebook)  # (B, T)
        if self.in_loop:
            cells = self.decompressor.order(dense, grid)  # (B, T', s^2)
        else:
            cells = nearest_codes(self.pool(latents, grid), codebook).unsqueeze(-1)  # (B, T', 1)
        return CompactCodes(nearest_codes(self.globals_of(latents, grid), codebook), cells, dense, grid)
