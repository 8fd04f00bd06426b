"""The compressor (UniCompress, section 3, eq. 3): non-overlapping s x s windows of the dense grid."""

from __future__ import annotations

import torch


def raster_to_cells(x: torch.Tensor, stride: int) -> torch.Tensor:
    """Groups a square raster (B, T, ...) by window: (B, T', s^2, ...), cells and sub-positions in raster order."""
    side = round(x.shape[1] ** 0.5)
    x = x.unflatten(1, (side // stride, stride, side // stride, stride))  # (B, H/s, s, W/s, s, ...)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, H/s * W/s, s * s, ...)


def cells_to_raster(x: torch.Tensor, stride: int) -> torch.Tensor:
    """The inverse of `raster_to_cells`: (B, T', s^2, ...) -> (B, T, ...)."""
    side = round(x.shape[1] ** 0.5)
    x = x.unflatten(2, (stride, stride)).unflatten(1, (side, side))  # (B, H/s, W/s, s, s, ...)
    return x.transpose(2, 3).flatten(1, 4)  # (B, H * W, ...)


def average_pool(x: torch.Tensor, stride: int) -> torch.Tensor:
    """X_cont = AvgPool(X, s): (B, T, d) -> (B, T', d)."""
    return raster_to_cells(x, stride).mean(2)
