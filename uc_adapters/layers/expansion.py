"""Decompressors that expand compact codes after the language model's loop (UniCompress, section 3, eq. 7).

    raster   T steps of one dense code each, as in the paper
    phase    s^2 steps; step p draws sub-position p of all windows at once

The decoder's memory is (X_deq, G_hat), the entries of the compact codes and of the global codes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import nn

from .block_decoder import BlockDecoder, PickCodes
from .grid import Grid, Positions, compact_grid, raster_to_windows, windows_to_raster
from .positions import interpolate


class ExpansionDecompressor(nn.Module, ABC):
    """Expands compact codes to dense codes after the language model's loop. A subclass defines the order and the block size.

    Args:
        stride: s.
        side: The side of the square grid of dense codes on which positions are learned.
        code_width: C, the codebook's dimension.
        width: W, the decompressor's width.
        out_width: D, the language model's width.
        layers: The number of layers.
    """

    def __init__(self, stride: int, side: int, code_width: int, width: int, out_width: int, layers: int):
        super().__init__()
        self.stride, self.side = stride, side
        self.compact_in = nn.Linear(code_width, width)
        self.compact_positions = nn.Parameter(torch.randn((side // stride) ** 2, width) * 0.02)
        self.global_in = nn.Linear(code_width, width)
        self.decoder = BlockDecoder(side**2, code_width, width, out_width, layers)

    def step_positions(self, positions: Positions, grid: Grid) -> torch.Tensor:
        """Returns the position ids of the T' compact codes and of the token after them, those of an image of so many codes.

        The separator has the position id before them.
        """
        return positions(compact_grid(grid, self.stride)) + 1

    @abstractmethod
    def block(self, grid: Grid) -> int:
        """Returns the number of codes that one step draws."""

    @abstractmethod
    def positions(self, grid: Grid) -> torch.Tensor:
        """Returns the decoder's position embeddings for a grid, in the order of drawing, (T, W)."""

    @abstractmethod
    def order(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Reorders x (B, T, ...) from raster order to the order of drawing."""

    @abstractmethod
    def unorder(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Reorders x (B, T, ...) from the order of drawing to raster order."""

    def forward(self, entries: torch.Tensor, compact: torch.Tensor, globals_: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Returns features (B, T, D) for entries of the true codes (B, T, C), with teacher forcing; both are in raster order.

        `compact` are the entries X_deq (B, T', C), and `globals_` is G_hat (B, N_g, C).
        """
        condition, memory = self._read(compact, globals_, grid)
        ordered = self.order(entries, grid)
        return self.unorder(self.decoder(ordered, self.positions(grid), condition, memory, self.block(grid)), grid)

    def draw(self, codebook: torch.Tensor, compact: torch.Tensor, globals_: torch.Tensor, grid: Grid, pick: PickCodes):
        """Draws the dense codes (B, T), in raster order."""
        condition, memory = self._read(compact, globals_, grid)
        return self.unorder(self.decoder.draw(codebook, self.positions(grid), condition, memory, self.block(grid), pick), grid)

    def _read(self, compact: torch.Tensor, globals_: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the decoder's condition (B, T, W), in the order of drawing, and its memory (B, T' + N_g, W)."""
        positions = interpolate(self.compact_positions, self.side // self.stride, compact_grid(grid, self.stride))
        compact = self.compact_in(compact) + positions  # (B, T', W)
        spread = compact.unsqueeze(2).expand(-1, -1, self.stride**2, -1)  # (B, T', s^2, W)
        condition = self.order(windows_to_raster(spread, self.stride, grid), grid)  # (B, T, W)
        return condition, torch.cat([compact, self.global_in(globals_)], 1)


class RasterDecompressor(ExpansionDecompressor):
    """Draws one code in each of T steps, as in the paper."""

    def block(self, grid: Grid) -> int:
        return 1

    def positions(self, grid: Grid) -> torch.Tensor:
        return interpolate(self.decoder.positions, self.side, grid)

    def order(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        return x

    def unorder(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        return x


class PhaseDecompressor(ExpansionDecompressor):
    """Draws in s^2 steps; step p draws sub-position p of every window."""

    def block(self, grid: Grid) -> int:
        return math.prod(compact_grid(grid, self.stride))

    def positions(self, grid: Grid) -> torch.Tensor:
        side, windows = self.side // self.stride, compact_grid(grid, self.stride)
        phases = self.decoder.positions.unflatten(0, (self.stride**2, -1))  # (s^2, (side / s)^2, W)
        return torch.cat([interpolate(phase, side, windows) for phase in phases])

    def order(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        return raster_to_windows(x, self.stride, grid).transpose(1, 2).flatten(1, 2)  # (B, s^2 * T', ...)

    def unorder(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        windows = x.unflatten(1, (self.stride**2, -1)).transpose(1, 2)  # (B, T', s^2, ...)
        return windows_to_raster(windows, self.stride, grid)
