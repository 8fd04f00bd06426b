"""The two modules that an adapter puts into a base: what shortens reading, and what shortens drawing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .config import UniCompressConfig
from .families import Geometry
from .layers import (
    CellDecompressor,
    GlobalExtractor,
    PhaseDecompressor,
    RasterDecompressor,
    average_pool,
    nearest_codes,
    raster_to_cells,
    unit,
)


class ReadCompressor(nn.Module):
    """Dense features -> {G, separator, X_cont} in the same feature space, ahead of the base's aligner."""

    def __init__(self, config: UniCompressConfig, geometry: Geometry):
        super().__init__()
        width, count = geometry.read_width, config.num_global_tokens
        self.stride = config.stride
        self.extractor = GlobalExtractor(width, width, count, geometry.read_side**2) if count else None
        self.separator = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, T, read_width) -> (B, N_g + 1 + T', read_width)."""
        parts = [self.separator.expand(len(features), 1, -1), average_pool(features, self.stride)]
        if self.extractor is not None:
            parts.insert(0, self.extractor(features))
        return torch.cat(parts, 1)


@dataclass
class CompactCodes:
    """One batch of images as the language model draws them.

    `globals` are codes Z_g (B, N_g). `cells` are, for the decompressors after the loop, the pooled codes Z_x
    (B, T', 1); for "cell", the dense codes of each cell (B, T', s^2). `dense` are the base's codes, (B, T).
    """

    globals: torch.Tensor
    cells: torch.Tensor
    dense: torch.Tensor


class DrawCompressor(nn.Module):
    """Latents of the base's VQ tokenizer -> compact codes, and the decompressor back to dense codes."""

    def __init__(self, config: UniCompressConfig, geometry: Geometry):
        super().__init__()
        self.stride, self.num_global_tokens = config.stride, config.num_global_tokens
        width, code_width, dense = config.decompressor_width, geometry.code_width, geometry.draw_side**2
        self.extractor = GlobalExtractor(code_width, width, self.num_global_tokens, dense) if self.num_global_tokens else None
        self.separator = nn.Parameter(torch.randn(geometry.hidden_size) * 0.02)
        shape = {
            "code_width": code_width,
            "width": width,
            "out_width": geometry.hidden_size,
            "layers": config.decompressor_layers,
        }
        if config.decompressor == "cell":
            self.decompressor = CellDecompressor(config.stride, **shape)
        else:
            after_loop = {"phase": PhaseDecompressor, "raster": RasterDecompressor}[config.decompressor]
            self.decompressor = after_loop(config.stride, dense, **shape)

    @property
    def in_loop(self) -> bool:
        """Whether dense codes come back inside the language model's loop."""
        return isinstance(self.decompressor, CellDecompressor)

    def globals_of(self, latents: torch.Tensor) -> torch.Tensor:
        """Global tokens before quantisation, unit-norm: (B, T, C) -> (B, N_g, C)."""
        if self.extractor is None:
            return latents[:, :0]
        return unit(self.extractor(latents.to(self.separator.dtype)).float())

    def compress(self, latents: torch.Tensor, codebook: torch.Tensor) -> CompactCodes:
        """Unit-norm latents (B, T, C) -> compact codes, with the base's codebook (K, C)."""
        dense = nearest_codes(latents, codebook)  # (B, T)
        if self.in_loop:
            cells = raster_to_cells(dense, self.stride)  # (B, T', s^2)
        else:
            cells = nearest_codes(average_pool(latents, self.stride), codebook).unsqueeze(-1)  # (B, T', 1)
        return CompactCodes(nearest_codes(self.globals_of(latents), codebook), cells, dense)
