"""Quantises with the base's own codebook (UniCompress, section 3: Z_g, Z_x)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def unit(x: torch.Tensor) -> torch.Tensor:
    """Scales x to length one along its last dimension."""
    return F.normalize(x, dim=-1)


def nearest_codes(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Returns the indices (...) of the codebook entries (K, C) that are nearest to x (..., C).

    |x - e|^2 is smallest for the e with the largest x e - |e|^2 / 2. On the unit sphere that is the nearest entry by cosine.
    """
    with torch.autocast(x.device.type, enabled=False):  # rounding to bfloat16 would change a fifth of the codes
        x, codebook = x.float(), codebook.float()
        return (x @ codebook.T - codebook.square().sum(-1) / 2).argmax(-1)


def straight_through(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Returns the nearest entries of x (..., C) in the forward pass; the backward pass is the identity."""
    return x + (codebook[nearest_codes(x, codebook)] - x).detach()
