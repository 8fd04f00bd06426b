"""The compressor (UniCompress, section 3, eq. 3), which averages non-overlapping s x s windows of the dense grid."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..errors import InputError

# Rows and columns of an image in tokens
Grid = tuple[int, int]
# A grid of H x W tokens -> their position ids, and that of the token after the image, (..., H * W + 1)
Positions = Callable[[Grid], torch.Tensor]


def compact_grid(grid: Grid, stride: int) -> Grid:
    """Returns the compact grid of a dense grid.

    Raises:
        InputError: The stride does not divide the dense grid.
    """
    rows, columns = grid
    if rows % stride or columns % stride:
        raise InputError(
            f"An image of {rows} x {columns} tokens; expected rows and columns that stride {stride} divides. Prepare images "
            "and prompts with the adapter's processor, AutoProcessor.from_pretrained(adapter), which chooses such sizes."
        )
    return rows // stride, columns // stride


def raster_to_windows(x: torch.Tensor, stride: int, grid: Grid) -> torch.Tensor:
    """Groups a raster (B, T, ...) by window, (B, T', s^2, ...). Windows and sub-positions are in raster order."""
    rows, columns = compact_grid(grid, stride)
    x = x.unflatten(1, (rows, stride, columns, stride))  # (B, H/s, s, W/s, s, ...)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, H/s * W/s, s * s, ...)


def windows_to_raster(x: torch.Tensor, stride: int, grid: Grid) -> torch.Tensor:
    """Inverts `raster_to_windows`: turns windows (B, T', s^2, ...) into a raster (B, T, ...)."""
    x = x.unflatten(2, (stride, stride)).unflatten(1, compact_grid(grid, stride))  # (B, H/s, W/s, s, s, ...)
    return x.transpose(2, 3).flatten(1, 4)  # (B, H * W, ...)


def average_pool(x: torch.Tensor, stride: int, grid: Grid) -> torch.Tensor:
    """Computes X_cont = AvgPool(X, s), (B, T', d), from X (B, T, d) (eq. 3)."""
    return raster_to_windows(x, stride, grid).mean(2)


class AveragePool(nn.Module):
    """`average_pool` as a module with `stride` s, so that `recipes/ablate.py` can replace it."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Pools x (B, T, d) to (B, T', d)."""
        return average_pool(x, self.stride, grid)
