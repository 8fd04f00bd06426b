"""The decompressor that draws inside the language model's loop: a depth transformer over the next s^2 codes.

RQ-Transformer and Moshi predict several codes from one hidden state in the same way. Here the codes are neighbours in the
raster, the base's own order.
"""

from __future__ import annotations

import torch
from torch import nn

from .block_decoder import BlockDecoder, PickCodes
from .grid import Grid


class StripDecompressor(nn.Module):
    """Draws the next s^2 codes of the raster from the language model's hidden state, inside its loop.

    No pooled code comes between the language model and the dense codes. So no information passes a bottleneck of one code a
    window, and the likelihood of the dense codes is exact. The order is the base's own, s^2 codes at a time. Each step uses the
    position id of its last code, so its hidden state can match the base's, and the base can teach an adapter code by code.
    The features are the hidden state plus what the decoder adds: with a decoder of zeros, the first code of a strip would be
    drawn as the base draws it.

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
        # The mean of a step's embeddings loses the order of its codes: a linear map of the entries in their order is added.
        # It starts at zero, so the input starts as the mean.
        self.places_in = nn.Linear(stride**2 * code_width, out_width, bias=False)
        nn.init.zeros_(self.places_in.weight)

    def order(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        """From raster (B, T, ...) to what each step draws, (B, T', s^2, ...)."""
        return x.unflatten(1, (-1, self.stride**2))

    def unorder(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The inverse of `order`."""
        return x.flatten(1, 2)

    def position_deltas(self, grid: Grid, has_eol: bool) -> list[int]:
        """The distance of each step's input from the token before it, in position ids, T' of them.

        A strip has the position id of its last code in the base's own sequence, the separator that of the first code.
        `has_eol`: the base's sequence has a token after each row, the compact one a token after every s rows.
        """
        rows, columns = grid
        length = self.stride**2
        last = [length * (index + 1) - 1 for index in range(rows * columns // length)]  # of each strip, in the raster
        hidden = [has_eol * (code // columns - code // (self.stride * columns)) for code in last]  # row ends left out so far
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
        state = self.hidden_in(hidden).unsqueeze(1)  # (B, 1, W)
        return state.expand(-1, len(self.decoder.positions), -1), self.memory(state, globals_)

    def memory(self, state: torch.Tensor, globals_: torch.Tensor) -> torch.Tensor:
        """What every layer attends to, (B, M, W): the hidden state alone, `state` (B, 1, W)."""
        return state
