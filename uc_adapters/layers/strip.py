"""The decompressor that draws inside the language model's loop: a depth transformer over the next k codes.

RQ-Transformer and Moshi also predict several codes from one hidden state. Here the codes are consecutive in raster order, which
is the base's own order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .block_decoder import BlockDecoder, PickCodes
from .grid import Grid, Positions


class StripDecompressor(nn.Module):
    """Draws the next k codes in raster order from the language model's hidden state, inside its loop.

    There is no pooled code between the language model and the dense codes. So no information is lost in a bottleneck of one
    code per window, and the likelihood of the dense codes is exact. The order is the base's own, k codes in each step. Each
    step uses the position id of its last code, so its hidden state can match the base's, and the base can teach an adapter code
    by code. The features are the sum of the hidden state and the decoder's output. If the decoder's output were zero, the first
    code of a strip would be drawn as the base draws it.

    Args:
        lengths: The numbers of codes that a step may have, k. If there are several, learned embeddings tell which one it is, to
            the language model and to the decoder.
        code_width: C, the codebook's dimension.
        width: W, the decoder's width.
        out_width: D, the language model's width.
        layers: The number of layers.
        global_width: The width of the global tokens to which every layer attends beside the hidden state; None if there are
            none.
    """

    def __init__(
        self,
        lengths: tuple[int, ...],
        code_width: int,
        width: int,
        out_width: int,
        layers: int,
        global_width: int | None = None,
    ):
        super().__init__()
        self.lengths, length = lengths, max(lengths)
        self.hidden_in = nn.Linear(out_width, width)
        self.global_in = None if global_width is None else nn.Linear(global_width, width)
        self.decoder = BlockDecoder(length, code_width, width, out_width, layers)
        # The mean of a step's embeddings loses the order of its codes, so a linear map of the entries in their order is added.
        # It starts at zero, so the input starts as the mean.
        self.places_in = nn.Linear(length * code_width, out_width, bias=False)
        nn.init.zeros_(self.places_in.weight)
        self.input_lengths = nn.Parameter(torch.zeros(len(lengths), out_width)) if len(lengths) > 1 else None
        self.decoder_lengths = nn.Parameter(torch.randn(len(lengths), width) * 0.02) if len(lengths) > 1 else None

    def order(self, x: torch.Tensor, grid: Grid, length: int) -> torch.Tensor:
        """Groups a raster (B, T, ...) by the step that draws it, (B, T', length, ...). Zeros fill up the last step."""
        missing = -x.shape[1] % length
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing)).unflatten(1, (-1, length))

    def unorder(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Inverts `order`: turns steps (B, T', k, ...) into a raster (B, T, ...)."""
        return x.flatten(1, 2)[:, : grid[0] * grid[1]]

    def step_positions(self, positions: Positions, grid: Grid, length: int) -> torch.Tensor:
        """Returns the position ids of the T' steps and of the token after the image, (..., T' + 1).

        A step has the position id of its last code in the base's own sequence. The separator has that of the first code.

        Args:
            positions: Gives the position ids of the codes of a grid and of the token after them, from the first code on.
            grid: The grid of the dense codes.
            length: The number of codes in a step.
        """
        dense, count = positions(grid), grid[0] * grid[1]
        last = [min(first + length, count) - 1 for first in range(0, count, length)]
        return dense[..., [*last, count]]

    def forward(self, entries: torch.Tensor, hidden: torch.Tensor, globals_: torch.Tensor) -> torch.Tensor:
        """Returns teacher-forced features (B, k, D) from entries (B, k, C), hidden (B, D) and globals_ (B, N, global_width)."""
        length = entries.shape[1]
        condition, memory = self._read(hidden, globals_, length)
        return hidden.unsqueeze(1) + self.decoder(entries, self.decoder.positions[:length], condition, memory, 1)

    def draw(self, codebook: torch.Tensor, hidden: torch.Tensor, globals_: torch.Tensor, length: int, pick: PickCodes):
        """Draws the codes of one step, (B, length)."""
        condition, memory = self._read(hidden, globals_, length)
        positions = self.decoder.positions[:length]
        return self.decoder.draw(codebook, positions, condition, memory, 1, lambda features: pick(hidden + features))

    def embed(self, embeddings: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
        """Returns the next step's input (..., D) from this step's embeddings (..., k, D) and entries (..., k, C)."""
        length = entries.shape[-2]
        missing = max(self.lengths) - length
        places = self.places_in(F.pad(entries, (0, 0, 0, missing)).flatten(-2))
        return self.tell(embeddings.mean(-2) + places, length)  # AvgPool in embedding space

    def tell(self, inputs: torch.Tensor, length: int) -> torch.Tensor:
        """Adds to inputs of the language model (..., D) the embedding of the number of codes in a step."""
        return inputs if self.input_lengths is None else inputs + self.input_lengths[self.lengths.index(length)]

    def _read(self, hidden: torch.Tensor, globals_: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the decoder's condition (B, k, W) and its memory, (B, 1 + N, W): the hidden state and the global tokens."""
        state = self.hidden_in(hidden).unsqueeze(1)  # (B, 1, W)
        memory = state if self.global_in is None else torch.cat([state, self.global_in(globals_)], 1)
        if self.decoder_lengths is not None:
            state = state + self.decoder_lengths[self.lengths.index(length)]
        return state.expand(-1, length, -1), memory
