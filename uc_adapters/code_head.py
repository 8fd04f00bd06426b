"""The code head: turns the language model's hidden states into image codes. Training and generation share it.

There are two: `StripHead` draws dense codes inside the language model's loop, `ExpansionHead` draws compact codes there and
expands them afterwards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from .compression import DrawCompressor
from .families import Family
from .layers import Grid, StripDecompressor, nearest_codes

# logits (B, K) -> codes (B,)
Sampler = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class CompactCodes:
    """A batch of images of one size, as the language model generates them.

    Attributes:
        globals: Codes of the global tokens, Z_g (B, N); N = 0 with "strip", else N_g.
        steps: Codes that each further step draws, (B, T', k): s^2 dense codes with "strip", else one pooled code of Z_x.
        dense: The base's own codes, (B, T).
        grid: H x W of the dense codes.
    """

    globals: torch.Tensor
    steps: torch.Tensor
    dense: torch.Tensor
    grid: Grid


@dataclass
class Scores:
    """Scores of the true codes of a batch, each (B, N + 1 + T'); zero at the separator.

    A step that draws several codes sums their log-probabilities, which is the exact likelihood, and averages their accuracy.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor
    accuracy: torch.Tensor


class CodeHead(ABC):
    """The contract between a decompressor and what trains or generates with it.

    An image is `G [IMG_SEP] X`: N global codes, a separator that is never predicted, and T' steps of k codes each. A subclass
    says what a step's codes are, how they become the next input, how they are scored and drawn, and how they become dense.

    Args:
        family: The base.
        module: The active adapter's `GenCompressor`.
    """

    def __init__(self, family: Family, module: DrawCompressor):
        self.family, self.module = family, module
        self.dtype = module.separator.dtype

    @property
    @abstractmethod
    def codes_per_step(self) -> int:
        """k."""

    @abstractmethod
    def step_codes(self, latents: torch.Tensor, dense: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Latents (B, T, C) and dense codes (B, T) of images -> what each step shall draw, (B, T', k)."""

    @abstractmethod
    def embed_steps(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes of steps (B, T', k) -> inputs of the language model, (B, T', D)."""

    @abstractmethod
    def score_steps(
        self, hidden: torch.Tensor, codes: CompactCodes, teacher_states: torch.Tensor | None, teacher_weight: float
    ) -> torch.Tensor:
        """Hidden states before each step (B, T', D) -> log-probability, entropy and accuracy of its codes, (3, B, T')."""

    @abstractmethod
    def draw_step(self, hidden: torch.Tensor, globals_: torch.Tensor, sample: Sampler) -> torch.Tensor:
        """Hidden states (B, D) and entries of the global codes (B, N, C) -> the codes of the next step, (B, k)."""

    @abstractmethod
    def expand(self, globals_: torch.Tensor, steps: torch.Tensor, grid: Grid, sample: Sampler) -> torch.Tensor:
        """Drawn global codes (B, N) and steps (B, T', k) -> dense codes (B, T) in raster order."""

    @cached_property
    def codebook(self) -> torch.Tensor:
        """The base's codebook, (K, C); computed once, when it is first needed."""
        return self.family.codebook

    @torch.no_grad()
    def compress(self, pixel_values: torch.Tensor) -> CompactCodes:
        """Pixels (B, 3, H, W) -> the codes to generate."""
        grid = self.family.draw_grid(tuple(pixel_values.shape[2:]))
        return self.compress_latents(self.family.latents(pixel_values), grid)

    @torch.no_grad()
    def compress_latents(self, latents: torch.Tensor, grid: Grid) -> CompactCodes:
        """Latents (B, T, C) -> the codes to generate."""
        dense = nearest_codes(latents, self.codebook)  # (B, T)
        globals_ = nearest_codes(self.module.globals_of(latents, grid), self.codebook)  # (B, N)
        return CompactCodes(globals_, self.step_codes(latents, dense, grid), dense, grid)

    def globals_of(self, latents: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Global tokens before quantisation, in the codebook's space: (B, T, C) -> (B, N, C)."""
        return self.family.code_space(self.module.globals_of(latents, grid))

    def embed(self, codes: CompactCodes) -> torch.Tensor:
        """Inputs of the language model for `G [IMG_SEP] X`, (B, N + 1 + T', D)."""
        globals_ = self.family.embed_codes(codes.globals)  # (B, N, D)
        steps = self.embed_steps(codes.steps)  # (B, T', D)
        separator = self.separator.expand(len(steps), 1, -1)
        return torch.cat([globals_.to(steps.dtype), separator, steps], 1)

    def position_deltas(self, grid: Grid) -> torch.Tensor:
        """The distance of each of these inputs from the token before it, in position ids, (N + 1 + T',)."""
        of_steps = self.module.decompressor.position_deltas(grid, self.family.has_eol)
        return torch.tensor([1] * (self.module.num_global_codes + 1) + of_steps, device=self.family.device)

    @property
    def separator(self) -> torch.Tensor:
        """The learned embedding of IMG_SEP, (D,), in the language model's dtype."""
        return self.module.separator.to(self.family.base.dtype)

    def entries(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (...) -> codebook entries (..., C), in the adapter's dtype."""
        return self.codebook[codes].to(self.dtype)

    def score(
        self,
        hidden: torch.Tensor,
        codes: CompactCodes,
        teacher_states: torch.Tensor | None = None,
        teacher_weight: float = 1.0,
    ) -> Scores:
        """Scores the true codes from the hidden states before each place, (B, N + 1 + T', D).

        Args:
            hidden: Of the language model.
            codes: The true codes.
            teacher_states: A teacher's hidden states before each dense code, (B, T, D); "strip" alone learns from them.
            teacher_weight: The share of a step's log-probability that its negative `StripHead.divergence` replaces.
        """
        count = codes.globals.shape[1]
        of_globals = [_score(self.family.code_logits(hidden[:, :count]), codes.globals)] if count else []
        separator = torch.zeros(3, len(hidden), 1, device=hidden.device)
        of_steps = self.score_steps(hidden[:, count + 1 :], codes, teacher_states, teacher_weight)
        return Scores(*torch.cat([*of_globals, separator, of_steps], 2))


class StripHead(CodeHead):
    """Draws s^2 dense codes from each hidden state, inside the language model's loop."""

    @property
    def codes_per_step(self) -> int:
        return self.module.stride**2

    def step_codes(self, latents: torch.Tensor, dense: torch.Tensor, grid: Grid) -> torch.Tensor:
        return self.module.decompressor.order(dense, grid)

    def embed_steps(self, codes: torch.Tensor) -> torch.Tensor:
        embeddings = self.family.embed_codes(codes)  # (B, T', s^2, D)
        pooled = self.module.decompressor.embed(embeddings.to(self.dtype), self.entries(codes))
        return pooled.to(embeddings.dtype)

    def score_steps(
        self, hidden: torch.Tensor, codes: CompactCodes, teacher_states: torch.Tensor | None, teacher_weight: float
    ) -> torch.Tensor:
        flat = hidden.flatten(0, 1).to(self.dtype)  # (B * T', D)
        globals_ = self.entries(codes.globals).repeat_interleave(hidden.shape[1], 0)  # (B * T', N, C)
        features = self.module.decompressor(self.entries(codes.steps.flatten(0, 1)), flat, globals_)
        logits = self.family.code_logits(features)  # (B * T', s^2, K)
        log_probs, entropy, accuracy = _score(logits, codes.steps.flatten(0, 1))
        if teacher_states is not None:
            of_steps = self.module.decompressor.order(teacher_states, codes.grid).flatten(0, 1)  # (B * T', s^2, D)
            divergence = self.divergence(logits, flat, of_steps)
            log_probs = (1 - teacher_weight) * log_probs - teacher_weight * divergence
        scores = torch.stack([log_probs.sum(-1), entropy.sum(-1), accuracy.mean(-1)])  # (3, B * T')
        return scores.unflatten(1, hidden.shape[:2])

    def divergence(self, logits: torch.Tensor, hidden: torch.Tensor, teacher_states: torch.Tensor) -> torch.Tensor:
        """The divergence of steps from a teacher at the same places of the same order, (n, s^2), in nats.

        It is KL(teacher || student) of each code, plus the squared distance of the hidden state from the teacher's, relative to
        the mean square of the teacher's: both models stand at the same place, so the student's state can match the teacher's.

        Args:
            logits: Of the codes, (n, s^2, K).
            hidden: The language model's states before the steps, (n, D).
            teacher_states: The teacher's before each code, (n, s^2, D).
        """
        theirs = self.family.code_logits(teacher_states).float().log_softmax(-1)
        divergence = F.kl_div(logits.float().log_softmax(-1), theirs, reduction="none", log_target=True).sum(-1)
        before = teacher_states[:, 0].float()
        distance = (hidden.float() - before).square().mean(-1) / before.square().mean(-1)  # (n,)
        return divergence + distance.unsqueeze(-1)

    def draw_step(self, hidden: torch.Tensor, globals_: torch.Tensor, sample: Sampler) -> torch.Tensor:
        return self.module.decompressor.draw(
            self.codebook, hidden.to(self.dtype), globals_, lambda features: sample(self.family.code_logits(features))
        )

    def expand(self, globals_: torch.Tensor, steps: torch.Tensor, grid: Grid, sample: Sampler) -> torch.Tensor:
        return self.module.decompressor.unorder(steps, grid)


class ExpansionHead(CodeHead):
    """Draws one pooled code a step, and expands all of them to dense codes after the loop ("phase" and "raster", eq. 7)."""

    codes_per_step = 1

    def step_codes(self, latents: torch.Tensor, dense: torch.Tensor, grid: Grid) -> torch.Tensor:
        return nearest_codes(self.module.pool(latents, grid), self.codebook).unsqueeze(-1)

    def embed_steps(self, codes: torch.Tensor) -> torch.Tensor:
        return self.family.embed_codes(codes).squeeze(2)

    def score_steps(
        self, hidden: torch.Tensor, codes: CompactCodes, teacher_states: torch.Tensor | None, teacher_weight: float
    ) -> torch.Tensor:
        return _score(self.family.code_logits(hidden), codes.steps.squeeze(2))

    def draw_step(self, hidden: torch.Tensor, globals_: torch.Tensor, sample: Sampler) -> torch.Tensor:
        return sample(self.family.code_logits(hidden)).unsqueeze(-1)

    def expand(self, globals_: torch.Tensor, steps: torch.Tensor, grid: Grid, sample: Sampler) -> torch.Tensor:
        return self.module.decompressor.draw(
            self.codebook,
            self.entries(steps.squeeze(2)),
            self.entries(globals_),
            grid,
            lambda features: sample(self.family.code_logits(features)),
        )

    def dense_logits(self, codes: CompactCodes) -> torch.Tensor:
        """Teacher-forced logits of the dense codes given the compact ones, (B, T, K) (eq. 7)."""
        compact, globals_ = self.entries(codes.steps.squeeze(2)), self.entries(codes.globals)
        return self.family.code_logits(self.module.decompressor(self.entries(codes.dense), compact, globals_, codes.grid))


def code_head_of(family: Family, module: DrawCompressor) -> CodeHead:
    """The head that fits a module's decompressor."""
    return (StripHead if isinstance(module.decompressor, StripDecompressor) else ExpansionHead)(family, module)


def _score(logits: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Log-probability, entropy and top-1 hit of codes (B, L) under logits (B, L, K); (3, B, L)."""
    log_probs = logits.float().log_softmax(-1)
    chosen = log_probs.gather(-1, codes.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        hits = (log_probs.argmax(-1) == codes).float()
    return torch.stack([chosen, entropy, hits])
