"""The modules that an adapter adds to a base: one shortens the images that are read, the other those that are generated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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


class WindowReader(nn.Module):
    """The common part of both compressors of images to read: what is in front of the windows, {G, separator}.

    If the adapter is trained for several strides, each has a separator of its own, which tells the language model the stride.
    """

    tokenizer_parts = ("extractor",)

    def __init__(self, config: UniCompressConfig, geometry: Geometry, extractor_width: int):
        super().__init__()
        self.strides, self.default_stride = config.strides, config.read_stride()
        width, count = geometry.read_width, config.num_global_tokens
        self.extractor = GlobalExtractor(width, extractor_width, count, geometry.read_side) if count else None
        shape = (len(self.strides), width) if len(self.strides) > 1 else (width,)
        self.separator = nn.Parameter(torch.randn(shape) * 0.02)

    def framed(self, dense: torch.Tensor, windows: torch.Tensor, grid: Grid, stride: int) -> torch.Tensor:
        """Puts {G, separator} in front of windows (B, T', d) of dense tokens (B, T, d)."""
        separator = self.separator if self.separator.ndim == 1 else self.separator[self.strides.index(stride)]
        parts = [separator.expand(len(windows), 1, -1), windows]
        if self.extractor is not None:
            parts.insert(0, self.extractor(dense, grid))
        return torch.cat(parts, 1)


class ReadCompressor(WindowReader):
    """Compresses dense features to {G, separator, X_cont} in the same feature space, before the base's aligner."""

    def __init__(self, config: UniCompressConfig, geometry: Geometry):
        super().__init__(config, geometry, geometry.read_width)
        self.pool = AveragePool(self.default_stride)

    def forward(self, features: torch.Tensor, grid: Grid, stride: int | None = None) -> torch.Tensor:
        """Compresses features (B, T, read_width) to (B, N_g + 1 + T', read_width).

        `stride` is one for which the adapter is trained. Default: the one in the middle.
        """
        stride = stride or self.default_stride
        pool = self.pool if stride == self.default_stride else AveragePool(stride)
        return self.framed(features, pool(features, grid), grid, stride)


class CodeReadCompressor(WindowReader):
    """The same for bases that read codes: compresses embeddings of codes to {G, separator, X_cont}, inputs of the language
    model.

    The mean of a window's embeddings loses the order of its codes. So the module adds a linear map of the codebook entries in
    their order. The map starts at zero, so the module starts as AvgPool. Each stride has columns of its own in it.
    """

    def __init__(self, config: UniCompressConfig, geometry: Geometry):
        super().__init__(config, geometry, config.decompressor_width)
        self.counts = [stride**2 for stride in self.strides]  # codes in a window
        self.places_in = nn.Linear(sum(self.counts) * geometry.code_width, geometry.read_width, bias=False)
        nn.init.zeros_(self.places_in.weight)

    def forward(self, embeddings: torch.Tensor, entries: torch.Tensor, grid: Grid, stride: int | None = None) -> torch.Tensor:
        """Compresses embeddings (B, T, D) and entries (B, T, C) of codes to (B, N_g + 1 + T', D), with the given stride."""
        stride = stride or self.default_stride
        place = self.strides.index(stride)
        ordered = raster_to_windows(entries, stride, grid)  # (B, T', s^2, C)
        ordered = F.pad(ordered, (0, 0, sum(self.counts[:place]), sum(self.counts[place + 1 :])))  # (B, T', places, C)
        windows = average_pool(embeddings, stride, grid) + self.places_in(ordered.flatten(2))  # (B, T', D)
        return self.framed(embeddings, windows, grid, stride)


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
        self.stride, self.num_global_codes = config.read_stride(), config.num_global_codes
        self.num_globals = config.num_drawing_globals
        width, code_width, side = config.decompressor_width, geometry.code_width, geometry.draw_side
        self.pool = AveragePool(self.stride)
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
        shape |= {"stride": config.read_stride(), "side": geometry.draw_side}
    else:
        shape["lengths"] = config.strip_lengths
        shape["global_width"] = geometry.hidden_size if config.drawing_global_tokens else None
    return kind(**shape)
