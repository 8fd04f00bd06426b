"""Global meta tokens (UniCompress, section 3, eq. 1 and 2): learned queries attend once to all dense tokens."""

from __future__ import annotations

import torch
from torch import nn

from .attention import Attention
from .grid import Grid
from .positions import interpolate


class GlobalExtractor(nn.Module):
    """N_g learned queries cross-attend to the dense tokens; `G = LayerNorm(Q + MHA(Q, X, X))`.

    The dense tokens are not changed. The queries include the positions of the global tokens. The positions of the dense tokens
    are learned on a square grid, and interpolated to other grids.

    Args:
        in_width: The width of the dense tokens.
        width: The width of the attention. If it differs from `in_width`, tokens are projected in and out.
        num_tokens: N_g, at least 1.
        side: The side of the square grid on which positions are learned.
    """

    def __init__(self, in_width: int, width: int, num_tokens: int, side: int):
        super().__init__()
        self.side = side
        self.queries = nn.Parameter(torch.randn(num_tokens, width) * 0.5)  # far enough apart that they do not start collapsed
        self.dense_positions = nn.Parameter(torch.randn(side**2, width) * 0.02)
        self.project_in = nn.Identity() if in_width == width else nn.Linear(in_width, width)
        self.attention = Attention(width)
        self.norm = nn.LayerNorm(width)
        self.project_out = nn.Identity() if in_width == width else nn.Linear(width, in_width)

    def forward(self, dense: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Extracts global tokens (B, N_g, in_width) from dense tokens (B, T, in_width)."""
        keys = self.project_in(dense) + interpolate(self.dense_positions, self.side, grid)  # (B, T, W)
        queries = self.queries.expand(dense.shape[0], -1, -1)  # (B, N_g, W)
        return self.project_out(self.norm(queries + self.attention(queries, self.attention.keys_values(keys))))
