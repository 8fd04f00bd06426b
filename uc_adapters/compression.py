"""The modules that an adapter adds to a base: one shortens the images that are read, the other those that are generated."""

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
    """Compresses dense features to {G, separator, X_cont} in the same feature space, before the base's aligner."""

    tokenizer_parts = ("extractor",)

    def __init__(self, config: UniCompressConfig, geometry: Geometry):
        super().__init__()
        width, count = geometry.read_width, config.num_global_tokens
        self.pool = AveragePool(config.stride)
        self.extractor = GlobalExtractor(width, width, count, geometry.read_side) if count else None
        self.separator = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, features: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Compresses features (B, T, read_width) to (B, N_g + 1 + T', read_width)."""
        parts = [self.separator.expand(len(features), 1, -1), self.pool(features, grid)]
        if self.extractor is not None:
            parts.insert(0, self.extractor(features, grid))
        return torch.cat(parts, 1)


class CodeReadCompressor(nn.Module):
    """The same for bases that read codes: compresses embeddings of codes to {G, separator, X_cont}, inputs of the language
    model.

    The mean of a window's embeddings loses the order of its codes. So the module adds a linear map of the codebook entries in
    their order. The map starts at zero, so the module starts as AvgPool.
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
        """Compresses embeddings (B, T, D) and entries (B, T, C) of codes to (B, N_g + 1 + T', D)."""
        ordered = self.places_in(raster_to_windows(entries, self.stride, grid).flatten(2))  # (B, T', s^2, C) -> (B, T', D)
        windows = average_pool(embeddings, self.stride, grid) + ordered
        parts = [self.separator.expand(len(windows), 1, -1), windows]
        if self.extractor is not None:
            parts.insert(0, self.extractor(embeddings, grid))
        return torch.cat(parts, 1)


class NoReadCompressor(nn.Module):
    """The same for bases whose images to read stay as they are: it has no weights."""

    tokenizer_parts = ()
    extractor = None

    def __init__(self, config: UniCompressConfig, geometry: Geometry):
        super().__init__()


DECOMPRESSOR_CLASSES = {"strip": StripDecompressor, "phase": PhaseDecompressor, "raster": RasterDecompressor}


class DrawCompressor(nn.Module):
    """The modules that an adapter adds for generation: global tokens, a separator, and the decompressor.

    Global tokens are drawn as codes, and for training an extractor makes them of an image. With "strip" they are learned
    inputs, or there are none.
    """

    def __init__(self, config: UniCompressConfig, geometry: Geometry):
        super().__init__()
        self.stride, self.num_global_codes = config.stride, config.num_global_codes
        self.num_globals = config.num_drawing_globals
        width, code_width, side = config.decompressor_width, geometry.code_width, geometry.draw_side
        self.pool = AveragePool(config.stride)
        self.extractor = GlobalExtractor(code_width, width, self.num_global_codes, side) if self.num_global_codes else None
        self.global_tokens = None
        if config.drawing_global_tokens:
            self.global_tokens = nn.Parameter(torch.randn(self.num_globals, geometry.hidden_size) * 0.02)
        self.separator = nn.Parameter(torch.randn(geometry.hidden_size) * 0.02)
        self.decompressor = make_decompressor(DECOMPRESSOR_CLASSES[config.decompressor], config, geometry)

    @property
    def tokenizer_parts(self) -> tuple[str, ...]:
        """The parts that stage 1 trains; stage 2 trains the rest. "strip" learns from hidden states, which stage 1 lacks."""
        return ("extractor",) if isinstance(self.decompressor, StripDecompressor) else ("extractor", "pool", "decompressor")

    def globals_of(self, latents: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Returns the global tokens before quantisation, (B, N, C), from latents (B, T, C)."""
        if self.extractor is None:
            return latents[:, :0]
        return self.extractor(latents.to(self.separator.dtype), grid).float()


def make_decompressor(kind: type[nn.Module], config: UniCompressConfig, geometry: Geometry) -> nn.Module:
    """Makes a new decompressor of class `kind`, with the shapes that the adapter's config and its base require."""
    shape = {
        "code_width": geometry.code_width,
        "width": config.decompressor_width,
        "out_width": geometry.hidden_size,
        "layers": config.decompressor_layers,
    }
    if issubclass(kind, ExpansionDecompressor):  # it learns a position embedding for each code of the grid
        shape |= {"stride": config.stride, "side": geometry.draw_side}
    else:
        shape["lengths"] = config.strip_lengths
        shape["global_width"] = geometry.hidden_size if config.drawing_global_tokens else None
    return kind(**shape)
