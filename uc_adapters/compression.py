"""The modules that an adapter puts into a base: one shortens what is read, the other what is generated."""

from __future__ import annotations

import torch
from torch import nn

from .config import UniCompressConfig
from .families import Geometry
from .layers import (
    AveragePool,
    ExpansionDecompressor,
    GlobalExtractor,
    Grid,
    PhaseDecompressor,
    RasterDecompressor,
    StripDecompressor,
    average_pool,
    raster_to_windows,
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
    """The same for bases that read codes: embeddings of codes -> {G, separator, X_cont} as inputs of the language model.

    The mean of a window's embeddings loses the order of its codes. A linear map of the codebook entries in their order is
    added. It starts at zero, so the module starts as AvgPool.
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
        places = self.places_in(raster_to_windows(entries, self.stride, grid).flatten(2))  # (B, T', s^2, C) -> (B, T', D)
        windows = average_pool(embeddings, self.stride, grid) + places
        parts = [self.separator.expand(len(windows), 1, -1), windows]
        if self.extractor is not None:
            parts.insert(0, self.extractor(embeddings, grid))
        return torch.cat(parts, 1)


DECOMPRESSORS = {"strip": StripDecompressor, "phase": PhaseDecompressor, "raster": RasterDecompressor}


class DrawCompressor(nn.Module):
    """What an adapter adds to generation: an extractor of global tokens, a separator, and the decompressor to dense codes."""

    def __init__(self, config: UniCompressConfig, geometry: Geometry):
        super().__init__()
        self.stride, self.num_global_codes = config.stride, config.num_global_codes
        width, code_width, side = config.decompressor_width, geometry.code_width, geometry.draw_side
        self.pool = AveragePool(config.stride)
        self.extractor = GlobalExtractor(code_width, width, self.num_global_codes, side) if self.num_global_codes else None
        self.separator = nn.Parameter(torch.randn(geometry.hidden_size) * 0.02)
        self.decompressor = make_decompressor(DECOMPRESSORS[config.decompressor], config, geometry)

    @property
    def tokenizer_parts(self) -> tuple[str, ...]:
        """What stage 1 trains; stage 2 trains the rest. "strip" learns from hidden states, which stage 1 does not have."""
        return ("extractor",) if isinstance(self.decompressor, StripDecompressor) else ("extractor", "pool", "decompressor")

    def globals_of(self, latents: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Global tokens before quantisation: (B, T, C) -> (B, N, C)."""
        if self.extractor is None:
            return latents[:, :0]
        return self.extractor(latents.to(self.separator.dtype), grid).float()


def make_decompressor(kind: type[nn.Module], config: UniCompressConfig, geometry: Geometry) -> nn.Module:
    """A fresh decompressor, in the shapes that an adapter's config and its base give it."""
    shape = {
        "stride": config.stride,
        "code_width": geometry.code_width,
        "width": config.decompressor_width,
        "out_width": geometry.hidden_size,
        "layers": config.decompressor_layers,
    }
    if issubclass(kind, ExpansionDecompressor):  # it learns a position for each place of the grid
        shape["side"] = geometry.draw_side
    return kind(**shape)
