"""The autoregressive decoder of the decompressors (UniCompress, eq. 7): a small transformer over codes in a fixed order.

Every layer attends block-causally to the earlier codes, and to a memory. The input at a position is the sum of the embedding of
an earlier code (one block before it), the position embedding, and a condition. The output has the language model's width, and
the base's own generation head turns it into logits, so no new matrix of K rows is learned.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .attention import Attention

# features (B, D) -> codes (B,)
PickCodes = Callable[[torch.Tensor], torch.Tensor]


class DecoderLayer(nn.Module):
    """A layer of self-attention, cross-attention and an MLP, each with a norm before it."""

    def __init__(self, width: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.self_attention = Attention(width)
        self.cross_attention = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, memory, past=None, mask=None, attended=None):
        """Runs the layer on x (B, L, W). `memory` and `past` are keys and values. Returns the new x, and the past plus x.

        `attended` is what cross-attention gives, if it is known.
        """
        y = self.norms[0](x)
        keys, values = self.self_attention.keys_values(y)
        if past is not None:
            keys, values = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
        x = x + self.self_attention(y, (keys, values), mask)
        x = x + (self.cross_attention(self.norms[1](x), memory) if attended is None else attended)
        return x + self.mlp(self.norms[2](x)), (keys, values)


class BlockDecoder(nn.Module):
    """A transformer decoder over codes in a fixed order. Each step draws a block of codes.

    Args:
        length: The number of learned positions.
        code_width: C, the codebook's dimension.
        width: W, the decoder's width.
        out_width: D, the language model's width.
        layers: The number of layers.
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
        """Returns the features of every position, (B, L, D), with teacher forcing.

        Args:
            entries: The codebook entries of the true codes, in the decoder's order, (B, L, C).
            positions: The position embedding of each code, (L, W): `self.positions`, or these interpolated.
            condition: The embedding of each code's window or step, (B, L, W).
            memory: What cross-attention attends to, (B, M, W).
            block: The number of codes that are drawn at once. It divides L.
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
        """Draws all codes, `block` of them in each step, with cached keys and values.

        Args:
            codebook: The entries of the codebook, (K, C).
            positions: As in `forward`, (L, W).
            condition: As in `forward`, (B, L, W).
            memory: As in `forward`, (B, M, W).
            block: As in `forward`.
            pick: Chooses codes (B * block,) from features (B * block, D).

        Returns:
            The codes in the decoder's order, (B, L).
        """
        memories = [layer.cross_attention.keys_values(memory) for layer in self.layers]
        attended: list = [None] * len(self.layers)
        if memory.shape[1] == 1:  # attention to one token gives that token to every query, so once is enough
            attended = [layer.cross_attention(memory, memories[index]) for index, layer in enumerate(self.layers)]  # (B, 1, W)
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
                x, pasts[index] = layer(x, memories[index], pasts[index], attended=attended[index])
            features = self.out(self.norm(x))  # (B, block, D)
            codes = pick(features.flatten(0, 1)).unflatten(0, features.shape[:2])  # (B, block)
            drawn.append(codes)
        return torch.cat(drawn, 1)
