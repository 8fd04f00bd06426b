"""Pure tensor modules of the method: nothing here knows Hugging Face, PEFT or any base model.

Letters in shape comments: B batch, T = H * W dense tokens, T' = T / s^2 compact cells, s stride, N_g global tokens, K codes
of the base's codebook, C their dimension, D width of the language model; W also the width of the decompressor.
"""

from .decompressor import CellDecompressor, CompactDecompressor, PhaseDecompressor, RasterDecompressor, StripDecompressor
from .extractor import GlobalExtractor
from .grid import AveragePool, Grid, average_pool, cells_of, cells_to_raster, raster_to_cells
from .quantiser import nearest_codes, straight_through, unit

__all__ = [
    "AveragePool",
    "CellDecompressor",
    "CompactDecompressor",
    "GlobalExtractor",
    "Grid",
    "PhaseDecompressor",
    "RasterDecompressor",
    "StripDecompressor",
    "average_pool",
    "cells_of",
    "cells_to_raster",
    "nearest_codes",
    "raster_to_cells",
    "straight_through",
    "unit",
]
