"""Interpolates positions that were learned on a square grid to images of other sizes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .grid import Grid


def interpolate(positions: torch.Tensor, side: int, grid: Grid) -> torch.Tensor:
    """Interpolates positions of a `side` x `side` grid (side^2, W) bilinearly to another grid (H * W, W).

    Positions of the same grid are returned unchanged.
    """
    if grid == (side, side):
        return positions
    square = positions.T.unflatten(1, (1, side, side)).transpose(0, 1)  # (W, side^2) -> (1, W, side, side)
    interpolated = F.interpolate(square.float(), size=grid, mode="bilinear", align_corners=False)
    return interpolated.to(positions.dtype).flatten(2).squeeze(0).T  # (1, W, H, W) -> (H * W, W)
