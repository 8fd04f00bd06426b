"""Global meta tokens (UniCompress, section 3, eq. 1 and 2): learned queries read the whole dense field once."""

from __future__ import annotations

import torch
from torch import nn

from .attention import Attention
from .grid import Grid
from .positions import interpolate


class GlobalExtractor(nn.Module):
    """N_g learned queries cross-attend to the dense tokens; `G = LayerNorm(Q + MHA(Q, X, X))`.

    Dense tokens are only read. The queries carry the global tokens' own positions, the dense positions are learned on a
    square grid and interpolated to others.

    Args:
        in_width: Width of the dense tokens.
        width: Width of the attention. Where it differs from `in_width`, tokens are projected in and out.
        num_tokens: N_g, at least 1.
        side: Of the square grid that the positions are learned on.
    """

    def __init__(self, in_width: int, width: int, num_tokens: int, side: int):
        super().__init__()
        self.side = side
        self.queries = nn.Parameter(torch.randn(num_tokens, width) * 0.5)  # far enough apart not to start collapsed
        self.dense_positions = nn.Parameter(torch.randn(side**2, width) * 0.02)
        self.project_in = nn.Identity() if in_width == width else nn.Linear(in_width, width)
        self.attention = Attention(width)
        self.norm = nn.LayerNorm(width)
        self.project_out = nn.Identity() if in_width == width else nn.Linear(width, in_width)

    def forward(self, dense: torch.Tensor, grid: Grid) -> torch.Tensor:
        """(B, T, in_width) -> (B, N_g, in_width)."""
        keys = self.project_in(dense) + interpolate(self.dense_positions, self.side, grid)  # (B, T, W)
        queries = self.queries.expand(dense.shape[0], -1, -1)  # (B, N_g, W)
        return self.project_out(self.norm(queries + self.attention(queries, self.attention.keys_values(keys))))
