"""Pure tensor modules of the method: nothing here knows Hugging Face, PEFT or any base model.

Letters in shape comments: B batch, T = H * W dense tokens, T' = T / s^2 compact tokens, s stride, N_g global tokens, K codes
of the base's codebook, C their dimension, D width of the language model; W also the width of the decompressor.
"""

from .expansion import ExpansionDecompressor, PhaseDecompressor, RasterDecompressor
from .extractor import GlobalExtractor
from .grid import AveragePool, Grid, average_pool, compact_grid, raster_to_windows, windows_to_raster
from .quantiser import nearest_codes, straight_through, unit
from .strip import StripDecompressor

__all__ = [
    "AveragePool",
    "ExpansionDecompressor",
    "GlobalExtractor",
    "Grid",
    "PhaseDecompressor",
    "RasterDecompressor",
    "StripDecompressor",
    "average_pool",
    "compact_grid",
    "nearest_codes",
    "raster_to_windows",
    "straight_through",
    "unit",
    "windows_to_raster",
]
