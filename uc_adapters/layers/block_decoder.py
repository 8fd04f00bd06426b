"""The autoregressive decoder of a decompressor (UniCompress, eq. 7): a small transformer over codes in a fixed order.

Every layer attends to the codes before (block-causally) and to a memory. The input at a position is the embedding of the code
before it in the order, the position, and a condition. The output has the language model's width: the base's own generation
head turns it into logits, so no new matrix of K rows is learned.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .attention import Attention

# features (B, D) -> codes (B,)
PickCodes = Callable[[torch.Tensor], torch.Tensor]


class DecoderLayer(nn.Module):
    """Pre-norm self-attention, cross-attention, MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.self_attention = Attention(width)
        self.cross_attention = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, memory, past=None, mask=None):
        """x (B, L, W), memory keys and values, past keys and values or None; returns x and the grown past."""
        y = self.norms[0](x)
        keys, values = self.self_attention.keys_values(y)
        if past is not None:
            keys, values = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
        x = x + self.self_attention(y, (keys, values), mask)
        x = x + self.cross_attention(self.norms[1](x), memory)
        return x + self.mlp(self.norms[2](x)), (keys, values)


class BlockDecoder(nn.Module):
    """A transformer decoder over codes in a fixed order, a block of them a step.

    Args:
        length: Learned positions.
        code_width: C, the codebook's dimension.
        width: W.
        out_width: D.
        layers: Number of layers.
    """

    def __init__(self, length: int, code_width: int, width: int, out_width: int, layers: int):
        super().__init__()
        self.start = nn.Parameter(torch.randn(width) * 0.02)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        self.code_in = nn.Linear(code_width, width)
        self.layers = nn.ModuleList(DecoderLayer(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, out_width)

    def forward(
        self, entries: torch.Tensor, positions: torch.Tensor, condition: torch.Tensor, memory: torch.Tensor, block: int
    ) -> torch.Tensor:
        """Teacher forcing.

        Args:
            entries: The codebook entries of the true codes, in the order, (B, L, C).
            positions: Where each code stands, (L, W): `self.positions`, or those interpolated.
            condition: What each position knows of its window or step, (B, L, W).
            memory: (B, M, W).
            block: Codes drawn at once; it divides L.

        Returns:
            Features of every position, (B, L, D).
        """
        before = self.code_in(entries[:, :-block])  # (B, L - block, W)
        start = self.start.expand(len(entries), block, -1)
        x = torch.cat([start, before], 1) + positions + condition
        steps = torch.arange(len(positions), device=x.device) // block
        mask = steps[:, None] >= steps[None, :]  # block-causal, (L, L)
        for layer in self.layers:
            x, _ = layer(x, layer.cross_attention.keys_values(memory), mask=mask)
        return self.out(self.norm(x))

    def draw(
        self,
        codebook: torch.Tensor,
        positions: torch.Tensor,
        condition: torch.Tensor,
        memory: torch.Tensor,
        block: int,
        pick: PickCodes,
    ) -> torch.Tensor:
        """Draws all codes, `block` a step, with cached keys and values.

        Args:
            codebook: Entries, (K, C).
            positions: (L, W).
            condition: (B, L, W).
            memory: (B, M, W).
            block: As in `forward`.
            pick: Turns features (B * block, D) into codes (B * block,).

        Returns:
            Codes in the order, (B, L).
        """
        memories = [layer.cross_attention.keys_values(memory) for layer in self.layers]
        pasts: list = [None] * len(self.layers)
        drawn: list[torch.Tensor] = []
        for first in range(0, len(positions), block):
            here = slice(first, first + block)
            if drawn:
                before = self.code_in(codebook[drawn[-1]].to(self.start.dtype))
            else:
                before = self.start.expand(len(condition), block, -1)
            x = before + positions[here] + condition[:, here]
            for index, layer in enumerate(self.layers):
                x, pasts[index] = layer(x, memories[index], pasts[index])
            features = self.out(self.norm(x))  # (B, block, D)
            codes = pick(features.flatten(0, 1)).unflatten(0, features.shape[:2])  # (B, block)
            drawn.append(codes)
        return torch.cat(drawn, 1)
