"""Multi-head attention with explicit projections, because `nn.MultiheadAttention` is not bit-exact after a reload."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

HEAD_DIM = 64


def head_count(width: int) -> int:
    """Returns the number of heads: it divides `width`, gives them about 64 dimensions each, and is at least one."""
    return next(heads for heads in range(max(1, width // HEAD_DIM), 0, -1) if width % heads == 0)


class Attention(nn.Module):
    """Computes softmax(Q K^T) V. Keys and values may come from another sequence, or from a cache."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = head_count(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def keys_values(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values of a source (B, M, W), each (B, heads, M, W / heads)."""
        return self._split(self.key(source)), self._split(self.value(source))

    def forward(
        self, x: torch.Tensor, keys_values: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attends from x (B, L, W); `mask` (L, M) is True where attention is allowed. Returns (B, L, W)."""
        keys, values = keys_values
        y = F.scaled_dot_product_attention(self._split(self.query(x)), keys, values, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, heads, L, W / heads) -> (B, L, W)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, L, W) -> (B, heads, L, W / heads)
