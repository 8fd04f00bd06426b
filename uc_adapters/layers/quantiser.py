"""Quantising with the base's own codebook (UniCompress, section 3: Z_g, Z_x), by cosine as the original Janus does."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def unit(x: torch.Tensor) -> torch.Tensor:
    """x on the unit sphere, along its last dimension."""
    return F.normalize(x, dim=-1)


def nearest_codes(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Indices (...) of the entries of the unit-norm codebook (K, C) nearest by cosine to x (..., C)."""
    return (unit(x) @ codebook.T).argmax(-1)


def straight_through(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The nearest entries of x (..., C) in the forward pass, the identity of unit(x) in the backward pass."""
    x = unit(x)
    return x + (codebook[nearest_codes(x, codebook)] - x).detach()
