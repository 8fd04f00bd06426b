"""The autoregressive decompressor (UniCompress, section 3, eq. 7), in four orders over one small decoder.

After the language model's loop, from its compact codes:
    raster   T steps of one dense token, as in the paper
    phase    s^2 steps; step p draws sub-position p of every cell at once
Inside it, from each of its continuous hidden states, s^2 steps of one dense token:
    strip    the next s^2 codes of the raster: the base's own order
    cell     the codes of one s x s window, with global codes in front of all

Every layer attends to the dense prefix (block-causally) and to a memory: (X_deq, G_hat) for raster and phase, the hidden
state for strip, (hidden state, G_hat) for cell. The input at a position is the embedding of the code before it in the order,
the position, and the compact token of its cell. The output is of the language model's width: the base's own generation head
turns it into logits, so no new K-wide matrix is learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from .attention import Attention
from .grid import Grid, cells_of, cells_to_raster, raster_to_cells
from .positions import stretch

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
            positions: Where each code stands, (L, W): `self.positions`, or those stretched.
            condition: What each position knows of its cell, (B, L, W).
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


class CompactDecompressor(nn.Module):
    """Dense codes from compact *codes*, after the language model's loop: what raster and phase share.

    Args:
        stride: s.
        side: Of the square grid of dense codes that the positions are learned on.
        code_width: C.
        width: W.
        out_width: D.
        layers: Number of layers.
    """

    def __init__(self, stride: int, side: int, code_width: int, width: int, out_width: int, layers: int):
        super().__init__()
        self.stride, self.side = stride, side
        self.cell_in = nn.Linear(code_width, width)
        self.cell_positions = nn.Parameter(torch.randn((side // stride) ** 2, width) * 0.02)
        self.global_in = nn.Linear(code_width, width)
        self.decoder = BlockDecoder(side**2, code_width, width, out_width, layers)

    def advances(self, grid: Grid, row_ends: bool) -> list[int]:
        """By how many positions each compact code stands behind the token before it, T' of them: one each."""
        return [1] * math.prod(cells_of(grid, self.stride))

    def block(self, grid: Grid) -> int:
        """Codes drawn at once."""
        raise NotImplementedError

    def positions(self, grid: Grid) -> torch.Tensor:
        """The decoder's positions on a grid, in the order of drawing, (T, W)."""
        raise NotImplementedError

    def order(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        """From raster (B, T, ...) to the order of drawing."""
        raise NotImplementedError

    def unorder(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The inverse of `order`."""
        raise NotImplementedError

    def forward(self, entries: torch.Tensor, cells: torch.Tensor, globals_: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Teacher forcing: entries of the true codes (B, T, C) -> features (B, T, D), both in raster order.

        cells are the compact entries X_deq (B, T', C), globals_ is G_hat (B, N_g, C).
        """
        condition, memory = self._read(cells, globals_, grid)
        ordered = self.order(entries, grid)
        return self.unorder(self.decoder(ordered, self.positions(grid), condition, memory, self.block(grid)), grid)

    def draw(self, codebook: torch.Tensor, cells: torch.Tensor, globals_: torch.Tensor, grid: Grid, pick: PickCodes):
        """Draws the dense codes (B, T) in raster order."""
        condition, memory = self._read(cells, globals_, grid)
        return self.unorder(self.decoder.draw(codebook, self.positions(grid), condition, memory, self.block(grid), pick), grid)

    def _read(self, cells: torch.Tensor, globals_: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        positions = stretch(self.cell_positions, self.side // self.stride, cells_of(grid, self.stride))
        compact = self.cell_in(cells) + positions  # (B, T', W)
        spread = compact.unsqueeze(2).expand(-1, -1, self.stride**2, -1)  # (B, T', s^2, W)
        condition = self.order(cells_to_raster(spread, self.stride, grid), grid)  # (B, T, W)
        return condition, torch.cat([compact, self.global_in(globals_)], 1)


class RasterDecompressor(CompactDecompressor):
    """T steps of one token, as in the paper."""

    def block(self, grid: Grid) -> int:
        return 1

    def positions(self, grid: Grid) -> torch.Tensor:
        return stretch(self.decoder.positions, self.side, grid)

    def order(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        return x

    def unorder(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        return x


class PhaseDecompressor(CompactDecompressor):
    """s^2 steps; step p draws sub-position p of every cell."""

    def block(self, grid: Grid) -> int:
        return math.prod(cells_of(grid, self.stride))

    def positions(self, grid: Grid) -> torch.Tensor:
        side, cells = self.side // self.stride, cells_of(grid, self.stride)
        phases = self.decoder.positions.unflatten(0, (self.stride**2, -1))  # (s^2, (side / s)^2, W)
        return torch.cat([stretch(phase, side, cells) for phase in phases])

    def order(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        return raster_to_cells(x, self.stride, grid).transpose(1, 2).flatten(1, 2)  # (B, s^2 * T', ...)

    def unorder(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        cells = x.unflatten(1, (self.stride**2, -1)).transpose(1, 2)  # (B, T', s^2, ...)
        return cells_to_raster(cells, self.stride, grid)


class StripDecompressor(nn.Module):
    """The next s^2 codes of the raster from the language model's hidden state, inside its loop.

    No pooled code stands between the language model and the dense codes, so nothing is lost to a 14-bit bottleneck and the
    likelihood of the dense codes is exact. It is the base's own order, read and drawn s^2 codes at a time: a hidden state
    knows what the base's knows at the same place, and a strip stands where its last code would stand. So the base draws on
    as it learned to, and can teach an adapter code by code. Features start from the hidden state itself, and the decoder adds
    to it: were it silent, the first code of a strip would be drawn as the base draws it.

    Args:
        stride: s.
        code_width: C, the codebook's dimension.
        width: W, of the decoder.
        out_width: D, of the language model.
        layers: Number of layers.
    """

    def __init__(self, stride: int, code_width: int, width: int, out_width: int, layers: int):
        super().__init__()
        self.stride = stride
        self.hidden_in = nn.Linear(out_width, width)
        self.decoder = BlockDecoder(stride**2, code_width, width, out_width, layers)
        # The mean of a step's embeddings forgets which code stood where: so a linear map of the entries in their places is
        # added. At zero, it starts as the mean.
        self.places_in = nn.Linear(stride**2 * code_width, out_width, bias=False)
        nn.init.zeros_(self.places_in.weight)

    def order(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        """From raster (B, T, ...) to what each step draws, (B, T', s^2, ...)."""
        return x.unflatten(1, (-1, self.stride**2))

    def unorder(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The inverse of `order`."""
        return x.flatten(1, 2)

    def advances(self, grid: Grid, row_ends: bool) -> list[int]:
        """By how many positions each step's input stands behind the token before it, T' of them.

        A strip stands where its last code stands in the base's own sequence, the separator where the first one does.
        `row_ends`: a token stands behind each row there, and behind every s rows here.
        """
        rows, columns = grid
        length = self.stride**2
        last = [length * (index + 1) - 1 for index in range(rows * columns // length)]  # of each strip, in the raster
        hidden = [row_ends * (code // columns - code // (self.stride * columns)) for code in last]  # row ends left out so far
        places = [code + left_out for code, left_out in zip(last, hidden, strict=True)]
        return [place - before for place, before in zip(places, [0, *places], strict=False)]

    def forward(self, entries: torch.Tensor, hidden: torch.Tensor, globals_: torch.Tensor) -> torch.Tensor:
        """Teacher forcing: entries (B, s^2, C), hidden (B, D), globals_ (B, N, C) -> features (B, s^2, D)."""
        condition, memory = self._read(hidden, globals_)
        return hidden.unsqueeze(1) + self.decoder(entries, self.decoder.positions, condition, memory, 1)

    def draw(self, codebook: torch.Tensor, hidden: torch.Tensor, globals_: torch.Tensor, pick: PickCodes):
        """Draws the codes of one step, (B, s^2)."""
        condition, memory = self._read(hidden, globals_)
        positions = self.decoder.positions
        return self.decoder.draw(codebook, positions, condition, memory, 1, lambda features: pick(hidden + features))

    def embed(self, embeddings: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
        """The next step's input: embeddings (..., s^2, D) and entries (..., s^2, C) of this one's codes -> (..., D)."""
        return embeddings.mean(-2) + self.places_in(entries.flatten(-2))  # AvgPool in embedding space

    def _read(self, hidden: torch.Tensor, globals_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        told = self.hidden_in(hidden).unsqueeze(1)  # (B, 1, W)
        return told.expand(-1, len(self.decoder.positions), -1), self.memory(told, globals_)

    def memory(self, told: torch.Tensor, globals_: torch.Tensor) -> torch.Tensor:
        """What every layer attends to, (B, M, W): the hidden state alone, `told` (B, 1, W)."""
        return told


class CellDecompressor(StripDecompressor):
    """The codes of one s x s window, behind global codes: what adapters up to 0.2 drew with."""

    def __init__(self, stride: int, code_width: int, width: int, out_width: int, layers: int):
        super().__init__(stride, code_width, width, out_width, layers)
        self.global_in = nn.Linear(code_width, width)

    def order(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        return raster_to_cells(x, self.stride, grid)

    def unorder(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        return cells_to_raster(x, self.stride, grid)

    advances = CompactDecompressor.advances  # positions count compact tokens

    def memory(self, told: torch.Tensor, globals_: torch.Tensor) -> torch.Tensor:
        return torch.cat([told, self.global_in(globals_)], 1)
