"""The decompressor that draws inside the language model's loop: a depth transformer over the next s^2 codes.

RQ-Transformer and Moshi also predict several codes from one hidden state. Here the codes are consecutive in raster order, which
is the base's own order.
"""

from __future__ import annotations

import torch
from torch import nn

from .block_decoder import BlockDecoder, PickCodes
from .grid import Grid


class StripDecompressor(nn.Module):
    """Draws the next s^2 codes in raster order from the language model's hidden state, inside its loop.

    There is no pooled code between the language model and the dense codes. So no information is lost in a bottleneck of one
    code per window, and the likelihood of the dense codes is exact. The order is the base's own, s^2 codes in each step. Each
    step uses the position id of its last code, so its hidden state can match the base's, and the base can teach an adapter code
    by code. The features are the sum of the hidden state and the decoder's output. If the decoder's output were zero, the first
    code of a strip would be drawn as the base draws it.

    Args:
        stride: s.
        code_width: C, the codebook's dimension.
        width: W, the decoder's width.
        out_width: D, the language model's width.
        layers: The number of layers.
    """

    def __init__(self, stride: int, code_width: int, width: int, out_width: int, layers: int):
        super().__init__()
        self.stride = stride
        self.hidden_in = nn.Linear(out_width, width)
        self.decoder = BlockDecoder(stride**2, code_width, width, out_width, layers)
        # The mean of a step's embeddings loses the order of its codes, so a linear map of the entries in their order is added.
        # It starts at zero, so the input starts as the mean.
        self.places_in = nn.Linear(stride**2 * code_width, out_width, bias=False)
        nn.init.zeros_(self.places_in.weight)

    def order(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Groups a raster (B, T, ...) by the step that draws it, (B, T', s^2, ...)."""
        return x.unflatten(1, (-1, self.stride**2))

    def unorder(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Inverts `order`: turns steps (B, T', s^2, ...) into a raster (B, T, ...)."""
        return x.flatten(1, 2)

    def position_deltas(self, grid: Grid, has_eol: bool) -> list[int]:
        """Returns by how much the position id grows at each of the T' steps.

        A strip has the position id of its last code in the base's own sequence. The separator has that of the first code. With
        `has_eol`, the base's sequence has an EOL token after each row, and the compact one after every s rows.
        """
        rows, columns = grid
        length = self.stride**2
        last = [length * (index + 1) - 1 for index in range(rows * columns // length)]  # the last code of each strip
        skipped = [has_eol * (code // columns - code // (self.stride * columns)) for code in last]  # EOL tokens left out so far
        positions = [code + left_out for code, left_out in zip(last, skipped, strict=True)]
        return [position - before for position, before in zip(positions, [0, *positions], strict=False)]

    def forward(self, entries: torch.Tensor, hidden: torch.Tensor, globals_: torch.Tensor) -> torch.Tensor:
        """Returns teacher-forced features (B, s^2, D) from entries (B, s^2, C), hidden (B, D) and globals_ (B, N, C)."""
        condition, memory = self._read(hidden, globals_)
        return hidden.unsqueeze(1) + self.decoder(entries, self.decoder.positions, condition, memory, 1)

    def draw(self, codebook: torch.Tensor, hidden: torch.Tensor, globals_: torch.Tensor, pick: PickCodes):
        """Draws the codes of one step, (B, s^2)."""
        condition, memory = self._read(hidden, globals_)
        positions = self.decoder.positions
        return self.decoder.draw(codebook, positions, condition, memory, 1, lambda features: pick(hidden + features))

    def embed(self, embeddings: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
        """Returns the next step's input (..., D) from this step's embeddings (..., s^2, D) and entries (..., s^2, C)."""
        return embeddings.mean(-2) + self.places_in(entries.flatten(-2))  # AvgPool in embedding space

    def _read(self, hidden: torch.Tensor, globals_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the decoder's condition (B, s^2, W) and its memory (B, M, W)."""
        state = self.hidden_in(hidden).unsqueeze(1)  # (B, 1, W)
        return state.expand(-1, len(self.decoder.positions), -1), self.memory(state, globals_)

    def memory(self, state: torch.Tensor, globals_: torch.Tensor) -> torch.Tensor:
        """Returns what every layer attends to, (B, M, W). Here it is the hidden state alone, `state` (B, 1, W)."""
        return state
