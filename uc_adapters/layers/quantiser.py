"""Quantising with the base's own codebook (UniCompress, section 3: Z_g, Z_x)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def unit(x: torch.Tensor) -> torch.Tensor:
    """x on the unit sphere, along its last dimension."""
    return F.normalize(x, dim=-1)


def nearest_codes(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Indices (...) of the entries of the codebook (K, C) nearest to x (..., C).

    |x - e|^2 is least where x e - |e|^2 / 2 is greatest. For a codebook on the unit sphere that is the nearest by cosine.
    """
    with torch.autocast(x.device.type, enabled=False):  # rounded to bfloat16, a fifth of the codes would be others
        x, codebook = x.float(), codebook.float()
        return (x @ codebook.T - codebook.square().sum(-1) / 2).argmax(-1)


def straight_through(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The nearest entries of x (..., C) in the forward pass, the identity in the backward pass."""
    return x + (codebook[nearest_codes(x, codebook)] - x).detach()
