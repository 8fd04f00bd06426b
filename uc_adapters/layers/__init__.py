"""The method's tensor modules. They do not depend on Hugging Face, PEFT or any base model.

Letters in shapes: B is the batch, T = H * W the dense tokens, T' = T / s^2 the compact tokens, s the stride, N_g the number of
global tokens, K the number of codes in the base's codebook, C their dimension, D the width of the language model. W is also the
width of the decompressor.
"""

from .expansion import ExpansionDecompressor, PhaseDecompressor, RasterDecompressor
from .extractor import GlobalExtractor
from .grid import AveragePool, Grid, Positions, average_pool, compact_grid, raster_to_windows, windows_to_raster
from .quantiser import nearest_codes, straight_through, unit
from .strip import StripDecompressor

__all__ = [
    "AveragePool",
    "ExpansionDecompressor",
    "GlobalExtractor",
    "Grid",
    "PhaseDecompressor",
    "Positions",
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
