"""Compact drawing over a base's own code embeddings and head: what training and generation share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from .compression import CompactCodes, DrawCompressor
from .families import Family
from .layers import Grid

# logits (B, K) -> codes (B,)
Sampler = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Scores:
    """What the true codes of one batch score, each (B, N + 1 + T'); zero at the separator.

    A place of a decompressor inside the loop holds s^2 codes: its log-probability is their sum (the exact likelihood), its
    accuracy their mean.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor
    accuracy: torch.Tensor


class Drawing:
    """One adapter's drawing side, bound to its base.

    Args:
        family: The base.
        module: The active adapter's `DrawCompressor`.
    """

    def __init__(self, family: Family, module: DrawCompressor):
        self.family, self.module = family, module
        self.dtype = module.separator.dtype

    @cached_property
    def codebook(self) -> torch.Tensor:
        """The base's, (K, C); computed once, and only where it is needed."""
        return self.family.codebook

    @torch.no_grad()
    def compress(self, pixel_values: torch.Tensor) -> CompactCodes:
        """Pixels (B, 3, H, W) -> the codes to draw."""
        grid = self.family.draw_grid(tuple(pixel_values.shape[2:]))
        return self.compress_latents(self.family.latents(pixel_values), grid)

    @torch.no_grad()
    def compress_latents(self, latents: torch.Tensor, grid: Grid) -> CompactCodes:
        """Latents (B, T, C) -> the codes to draw."""
        return self.module.compress(latents, self.codebook, grid)

    def globals_of(self, latents: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Global tokens before quantisation, in the codebook's space: (B, T, C) -> (B, N, C)."""
        return self.family.code_space(self.module.globals_of(latents, grid))

    def embed(self, codes: CompactCodes) -> torch.Tensor:
        """Inputs of the language model for `G [IMG_SEP] X`, (B, N + 1 + T', D)."""
        globals_ = self.family.embed_codes(codes.globals)  # (B, N, D)
        cells = self.embed_cells(codes.cells)  # (B, T', D)
        separator = self.separator.expand(len(cells), 1, -1)
        return torch.cat([globals_.to(cells.dtype), separator, cells], 1)

    def advances(self, grid: Grid) -> torch.Tensor:
        """By how many positions each of these inputs stands behind the one before it, (N + 1 + T',)."""
        return torch.tensor(self.module.advances(grid, self.family.row_ends), device=self.family.device)

    @property
    def separator(self) -> torch.Tensor:
        """The learned embedding of IMG_SEP, (D,), in the language model's dtype."""
        return self.module.separator.to(self.family.base.dtype)

    def embed_cells(self, cells: torch.Tensor) -> torch.Tensor:
        """Codes of cells (B, T', k) -> (B, T', D): one code's embedding, or a cell's pooled embedding."""
        embeddings = self.family.embed_codes(cells)  # (B, T', k, D)
        if not self.module.in_loop:
            return embeddings.squeeze(2)
        pooled = self.module.decompressor.embed(embeddings.to(self.dtype), self.entries(cells))
        return pooled.to(embeddings.dtype)

    def entries(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (...) -> codebook entries (..., C), in the adapter's dtype."""
        return self.codebook[codes].to(self.dtype)

    def score(
        self, hidden: torch.Tensor, codes: CompactCodes, taught: torch.Tensor | None = None, share: float = 1.0
    ) -> Scores:
        """Scores the true codes from the hidden states before each place, (B, N + 1 + T', D).

        With a teacher's hidden states before each dense code, `taught` (B, T, D), a `share` of a place's log-probability
        is its `-divergence` instead.
        """
        count = codes.globals.shape[1]
        parts = []
        if count:
            parts.append(_score(self.family.code_logits(hidden[:, :count]), codes.globals))
        parts.append(torch.zeros(3, len(hidden), 1, device=hidden.device))  # the separator is never predicted
        before_cells = hidden[:, count + 1 :]  # (B, T', D)
        if not self.module.in_loop:
            parts.append(_score(self.family.code_logits(before_cells), codes.cells.squeeze(2)))
        else:
            flat = before_cells.flatten(0, 1).to(self.dtype)  # (B * T', D)
            globals_ = self.entries(codes.globals).repeat_interleave(before_cells.shape[1], 0)  # (B * T', N, C)
            features = self.module.decompressor(self.entries(codes.cells.flatten(0, 1)), flat, globals_)
            logits = self.family.code_logits(features)  # (B * T', s^2, K)
            log_probs, entropy, accuracy = _score(logits, codes.cells.flatten(0, 1))
            if taught is not None:
                of_cells = self.module.decompressor.order(taught, codes.grid).flatten(0, 1)  # (B * T', s^2, D)
                log_probs = (1 - share) * log_probs - share * self.divergence(logits, flat, of_cells)
            scores = torch.stack([log_probs.sum(-1), entropy.sum(-1), accuracy.mean(-1)])  # (3, B * T')
            parts.append(scores.unflatten(1, before_cells.shape[:2]))
        return Scores(*torch.cat(parts, 2))

    def divergence(self, logits: torch.Tensor, hidden: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
        """How far cells are from a teacher that stands at the same places of the same order, (n, s^2), in nats.

        KL(teacher || student) of each code; and, since what the language model is to know there is the teacher's own state,
        the distance of the one state from the other, as a share of the mean square of the teacher's there.

        Args:
            logits: Of the codes, (n, s^2, K).
            hidden: The language model's states before the cells, (n, D).
            taught: The teacher's before each code, (n, s^2, D).
        """
        theirs = self.family.code_logits(taught).float().log_softmax(-1)
        divergence = F.kl_div(logits.float().log_softmax(-1), theirs, reduction="none", log_target=True).sum(-1)
        before = taught[:, 0].float()
        distance = (hidden.float() - before).square().mean(-1) / before.square().mean(-1)  # (n,)
        return divergence + distance.unsqueeze(-1)

    def reconstruction_logits(self, codes: CompactCodes, cells: torch.Tensor, globals_: torch.Tensor) -> torch.Tensor:
        """Teacher-forced logits of the dense codes, (B, T, K), from compact entries (eq. 7); after the loop only."""
        features = self.module.decompressor(self.entries(codes.dense), cells, globals_, codes.grid)
        return self.family.code_logits(features)

    def draw_cell(self, hidden: torch.Tensor, globals_: torch.Tensor, sample: Sampler) -> torch.Tensor:
        """The codes of the next cell (B, k), from hidden states (B, D) and the entries of the global codes (B, N, C)."""
        if not self.module.in_loop:
            return sample(self.family.code_logits(hidden)).unsqueeze(-1)
        return self.module.decompressor.draw(
            self.codebook,
            hidden.to(self.dtype),
            globals_,
            lambda features: sample(self.family.code_logits(features)),
        )

    def expand(self, globals_: torch.Tensor, cells: torch.Tensor, grid: Grid, sample: Sampler) -> torch.Tensor:
        """Dense codes (B, T) of a grid, in raster order, from drawn global codes (B, N) and cells (B, T', k)."""
        if self.module.in_loop:
            return self.module.decompressor.unorder(cells, grid)
        return self.module.decompressor.draw(
            self.codebook,
            self.entries(cells.squeeze(2)),
            self.entries(globals_),
            grid,
            lambda features: sample(self.family.code_logits(features)),
        )


def _score(logits: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Log-probability, entropy and top-1 hit of codes (B, L) under logits (B, L, K); (3, B, L)."""
    log_probs = logits.float().log_softmax(-1)
    chosen = log_probs.gather(-1, codes.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        hits = (log_probs.argmax(-1) == codes).float()
    return torch.stack([chosen, entropy, hits])
