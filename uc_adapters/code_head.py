"""The code head: turns the language model's hidden states into image codes. Training and generation share it.

There are two. `StripHead` draws dense codes inside the language model's loop. `ExpansionHead` draws compact codes in the loop
and expands them afterwards.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from .compression import DrawCompressor
from .families import Family
from .layers import Grid, StripDecompressor, compact_grid, nearest_codes

# logits (B, K) -> codes (B,)
Sampler = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class CompactCodes:
    """The codes of a batch of images of one size, as the language model generates them.

    Attributes:
        globals: The codes of the global tokens, Z_g (B, N_g), or (B, 0) with "strip", which draws none.
        steps: The codes of each step after the separator, (B, T', k): dense codes with "strip", else one pooled code of Z_x.
        dense: The base's own codes, (B, T).
        grid: H and W of the dense codes.
    """

    globals: torch.Tensor
    steps: torch.Tensor
    dense: torch.Tensor
    grid: Grid


@dataclass
class Scores:
    """The scores of a batch's true codes, each (B, N + 1 + T'); they are zero at the separator.

    For a step of several codes, the log-probabilities are summed, which gives the exact likelihood; accuracies are averaged.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor
    accuracy: torch.Tensor


class CodeHead(ABC):
    """The interface between a decompressor and the code that trains or generates with it.

    An image is `G [IMG_SEP] X`: N global tokens, a separator that is never predicted, and T' steps of k codes each. Global
    tokens are codes, or learned inputs that are not predicted either. A subclass defines which codes a step has, how they
    become the next input, how they are scored and drawn, and how they become dense.

    Args:
        family: The family of the base.
        module: The active adapter's `DrawCompressor`.
        codes_per_step: k, the number of codes that one step draws.
    """

    def __init__(self, family: Family, module: DrawCompressor, codes_per_step: int):
        self.family, self.module, self.codes_per_step = family, module, codes_per_step
        self.dtype = module.separator.dtype

    @abstractmethod
    def step_codes(self, latents: torch.Tensor, dense: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Returns the true codes of each step, (B, T', k), from latents (B, T, C) and dense codes (B, T)."""

    @abstractmethod
    def embed_steps(self, codes: torch.Tensor) -> torch.Tensor:
        """Turns the codes of steps (B, T', k) into inputs of the language model, (B, T', D)."""

    @abstractmethod
    def score_steps(
        self,
        hidden: torch.Tensor,
        globals_: torch.Tensor,
        codes: CompactCodes,
        teacher_states: torch.Tensor | None,
        teacher_weight: float,
    ) -> torch.Tensor:
        """Returns log-probability, entropy and accuracy of each step, (3, B, T'), from the states before it, (B, T', D).

        `globals_` are those that `guides` returns.
        """

    @abstractmethod
    def draw_step(self, hidden: torch.Tensor, globals_: torch.Tensor, sample: Sampler) -> torch.Tensor:
        """Draws the codes of the next step, (B, k), from hidden states (B, D) and the global tokens that `guides` returns."""

    @abstractmethod
    def expand(self, globals_: torch.Tensor, steps: torch.Tensor, grid: Grid, sample: Sampler) -> torch.Tensor:
        """Turns drawn global codes (B, N) and steps (B, T', k) into dense codes (B, T) in raster order."""

    @cached_property
    def codebook(self) -> torch.Tensor:
        """The base's codebook, (K, C). It is computed once, on first use."""
        return self.family.codebook

    @torch.no_grad()
    def compress(self, pixel_values: torch.Tensor) -> CompactCodes:
        """Returns the codes to generate for pixels (B, 3, H, W)."""
        grid = self.family.draw_grid(tuple(pixel_values.shape[2:]))
        return self.compress_latents(self.family.latents(pixel_values), grid)

    @torch.no_grad()
    def compress_latents(self, latents: torch.Tensor, grid: Grid) -> CompactCodes:
        """Returns the codes to generate for latents (B, T, C)."""
        dense = nearest_codes(latents, self.codebook)  # (B, T)
        globals_ = nearest_codes(self.module.globals_of(latents, grid), self.codebook)  # (B, N)
        return CompactCodes(globals_, self.step_codes(latents, dense, grid), dense, grid)

    def globals_of(self, latents: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Returns the global tokens before quantisation, (B, N, C) in the codebook's space, from latents (B, T, C)."""
        return self.family.code_space(self.module.globals_of(latents, grid))

    def embed(self, codes: CompactCodes) -> torch.Tensor:
        """Returns the inputs of the language model for `G [IMG_SEP] X`, (B, N + 1 + T', D)."""
        globals_ = self.family.embed_codes(codes.globals)  # (B, N_g, D), or (B, 0, D)
        steps = self.embed_steps(codes.steps)  # (B, T', D)
        return torch.cat([globals_.to(steps.dtype), self.given(len(steps)), steps], 1)

    def given(self, count: int) -> torch.Tensor:
        """Returns the inputs before the steps that are not predicted, for `count` images: (count, n, D).

        They are the learned global tokens, if there are any, and the separator.
        """
        parts = [self.module.separator.unsqueeze(0)]
        if self.module.global_tokens is not None:
            parts.insert(0, self.module.global_tokens)
        return torch.cat(parts).to(self.family.base.dtype).expand(count, -1, -1)

    def guides(self, codes: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Returns the global tokens to which a decompressor attends.

        Args:
            codes: The global codes, (B, N_g), or (B, 0).
            states: The language model's hidden states at the learned global tokens, (B, N_g, D), or (B, 0, D).

        Returns:
            The states, if there are learned global tokens, or else the entries of the codes, (B, N, C).
        """
        return self.entries(codes) if self.module.global_tokens is None else states.to(self.dtype)

    @abstractmethod
    def count_steps(self, grid: Grid) -> int:
        """Returns T', the number of steps that draw an image.

        Raises:
            InputError: The stride does not divide the grid of the dense codes, and it has to.
        """

    @abstractmethod
    def steps_in_row(self, grid: Grid) -> int:
        """Returns the number of steps after which an EOL token follows, if the base has EOL tokens.

        Raises:
            InputError: As in `count_steps`.
        """

    @abstractmethod
    def step_positions(self, grid: Grid) -> torch.Tensor:
        """Returns the position ids of the T' steps and of the token after the image, (..., T' + 1), from the first code on."""

    def row_ends(self, grid: Grid) -> list[bool]:
        """Returns for each step whether an EOL token follows. One also follows the last step, if the base has EOL tokens."""
        if not self.family.has_eol:
            return [False] * self.count_steps(grid)
        count, in_row = self.count_steps(grid), self.steps_in_row(grid)
        return [step % in_row == 0 or step == count for step in range(1, count + 1)]

    def position_deltas(self, grid: Grid) -> torch.Tensor:
        """Returns by how much the position id grows at each input of `embed` and at the token after the image.

        Returns:
            (N + 1 + T' + 1,), or (axes, N + 1 + T' + 1) if the base's position ids have several axes.
        """
        positions = self.step_positions(grid)  # (..., T' + 1)
        deltas = positions.diff(prepend=torch.zeros_like(positions[..., :1]))
        deltas[..., 1:] -= torch.tensor(self.row_ends(grid)).long().to(deltas.device)  # an EOL token adds one itself
        front = deltas.new_ones(*deltas.shape[:-1], self.module.num_globals + 1)
        if self.module.global_tokens is not None:
            front[..., :-1] = 0  # they share the position id of the image's begin, so the base's own sequence keeps its places
        return torch.cat([front, deltas], -1).to(self.family.device)

    def entries(self, codes: torch.Tensor) -> torch.Tensor:
        """Returns the codebook entries (..., C) of codes (...), in the adapter's dtype."""
        return self.codebook[codes].to(self.dtype)

    def score(
        self,
        hidden: torch.Tensor,
        codes: CompactCodes,
        teacher_states: torch.Tensor | None = None,
        teacher_weight: float = 1.0,
    ) -> Scores:
        """Scores the true codes.

        Args:
            hidden: The language model's hidden states before each input of `embed`, (B, N + 1 + T', D).
            codes: The true codes.
            teacher_states: A teacher's hidden states before each dense code, (B, T, D). Only "strip" learns from them.
            teacher_weight: The weight, from 0 to 1, with which the negative `StripHead.divergence` replaces a step's
                log-probability. Default 1.
        """
        count, code_count = self.module.num_globals, codes.globals.shape[1]
        global_scores = [_score(self.family.code_logits(hidden[:, :code_count]), codes.globals)] if code_count else []
        given = torch.zeros(3, len(hidden), count + 1 - code_count, device=hidden.device)
        globals_ = self.guides(codes.globals, hidden[:, 1 : count + 1])  # the states at them
        step_scores = self.score_steps(hidden[:, count + 1 :], globals_, codes, teacher_states, teacher_weight)
        return Scores(*torch.cat([*global_scores, given, step_scores], 2))


class StripHead(CodeHead):
    """Draws k dense codes from each hidden state, inside the language model's loop."""

    def count_steps(self, grid: Grid) -> int:
        if self.family.has_eol:
            compact_grid(grid, self.module.stride)
        return math.ceil(math.prod(grid) / self.codes_per_step)

    def steps_in_row(self, grid: Grid) -> int:
        """Returns the steps of the fewest windows' rows that whole steps fill; with s^2 codes in a step, of one such row."""
        return math.lcm(self.module.stride * grid[1], self.codes_per_step) // self.codes_per_step

    def step_codes(self, latents: torch.Tensor, dense: torch.Tensor, grid: Grid) -> torch.Tensor:
        return self._order(dense, grid)

    def step_positions(self, grid: Grid) -> torch.Tensor:
        return self.module.decompressor.step_positions(self.family.code_positions, grid, self.codes_per_step)

    def given(self, count: int) -> torch.Tensor:
        return self.module.decompressor.tell(super().given(count), self.codes_per_step).to(self.family.base.dtype)

    def embed_steps(self, codes: torch.Tensor) -> torch.Tensor:
        embeddings = self.family.embed_codes(codes)  # (B, T', k, D)
        pooled = self.module.decompressor.embed(embeddings.to(self.dtype), self.entries(codes))
        return pooled.to(embeddings.dtype)

    def score_steps(
        self,
        hidden: torch.Tensor,
        globals_: torch.Tensor,
        codes: CompactCodes,
        teacher_states: torch.Tensor | None,
        teacher_weight: float,
    ) -> torch.Tensor:
        flat = hidden.flatten(0, 1).to(self.dtype)  # (B * T', D)
        globals_ = globals_.repeat_interleave(hidden.shape[1], 0)  # (B * T', N, ...)
        features = self.module.decompressor(self.entries(codes.steps.flatten(0, 1)), flat, globals_)
        logits = self.family.code_logits(features)  # (B * T', k, K)
        log_probs, entropy, accuracy = _score(logits, codes.steps.flatten(0, 1))
        if teacher_states is not None:
            step_states = self._order(teacher_states, codes.grid).flatten(0, 1)  # (B * T', k, D)
            divergence = self.divergence(logits, flat, step_states)
            log_probs = (1 - teacher_weight) * log_probs - teacher_weight * divergence
        scores = torch.stack([log_probs, entropy, accuracy]).unflatten(1, hidden.shape[:2])  # (3, B, T', k)
        drawn = self._order(torch.ones_like(codes.dense[:1]), codes.grid)  # (1, T', k); 0 in what fills up
        log_probs, entropy, accuracy = (scores * drawn).sum(-1)
        return torch.stack([log_probs, entropy, accuracy / drawn.sum(-1)])

    def divergence(self, logits: torch.Tensor, hidden: torch.Tensor, teacher_states: torch.Tensor) -> torch.Tensor:
        """Returns the divergence of each code from a teacher that generates the same codes in the same order, (n, k), in nats.

        It is KL(teacher || student) of the code, plus the squared distance between the hidden states of student and teacher,
        relative to the mean square of the teacher's. Both models have the same codes before them, so the student's state can
        match the teacher's.

        Args:
            logits: The logits of the codes, (n, k, K).
            hidden: The language model's hidden states before the steps, (n, D).
            teacher_states: The teacher's hidden states before each code, (n, k, D).
        """
        teacher_log_probs = self.family.code_logits(teacher_states).float().log_softmax(-1)
        divergence = F.kl_div(logits.float().log_softmax(-1), teacher_log_probs, reduction="none", log_target=True).sum(-1)
        before = teacher_states[:, 0].float()
        distance = (hidden.float() - before).square().mean(-1) / before.square().mean(-1)  # (n,)
        return divergence + distance.unsqueeze(-1)

    def draw_step(self, hidden: torch.Tensor, globals_: torch.Tensor, sample: Sampler) -> torch.Tensor:
        return self.module.decompressor.draw(
            self.codebook,
            hidden.to(self.dtype),
            globals_,
            self.codes_per_step,
            lambda features: sample(self.family.code_logits(features)),
        )

    def expand(self, globals_: torch.Tensor, steps: torch.Tensor, grid: Grid, sample: Sampler) -> torch.Tensor:
        return self.module.decompressor.unorder(steps, grid)

    def _order(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        return self.module.decompressor.order(x, grid, self.codes_per_step)


class ExpansionHead(CodeHead):
    """Draws one pooled code per step, and expands all of them to dense codes after the loop ("phase" and "raster", eq. 7)."""

    def __init__(self, family: Family, module: DrawCompressor):
        super().__init__(family, module, codes_per_step=1)

    def step_positions(self, grid: Grid) -> torch.Tensor:
        return self.module.decompressor.step_positions(self.family.code_positions, grid)

    def count_steps(self, grid: Grid) -> int:
        return math.prod(compact_grid(grid, self.module.stride))

    def steps_in_row(self, grid: Grid) -> int:
        return compact_grid(grid, self.module.stride)[1]

    def step_codes(self, latents: torch.Tensor, dense: torch.Tensor, grid: Grid) -> torch.Tensor:
        return nearest_codes(self.module.pool(latents, grid), self.codebook).unsqueeze(-1)

    def embed_steps(self, codes: torch.Tensor) -> torch.Tensor:
        return self.family.embed_codes(codes).squeeze(2)

    def score_steps(
        self,
        hidden: torch.Tensor,
        globals_: torch.Tensor,
        codes: CompactCodes,
        teacher_states: torch.Tensor | None,
        teacher_weight: float,
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
        """Returns teacher-forced logits of the dense codes, given the compact codes, (B, T, K) (eq. 7)."""
        compact, globals_ = self.entries(codes.steps.squeeze(2)), self.entries(codes.globals)
        return self.family.code_logits(self.module.decompressor(self.entries(codes.dense), compact, globals_, codes.grid))


def code_head_of(family: Family, module: DrawCompressor, strip_length: int) -> CodeHead:
    """Makes the code head that fits a module's decompressor. With "strip", a step draws `strip_length` codes."""
    if isinstance(module.decompressor, StripDecompressor):
        return StripHead(family, module, strip_length)
    return ExpansionHead(family, module)


def _score(logits: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Returns log-probability, entropy and top-1 hit of codes (B, L) under logits (B, L, K), as (3, B, L)."""
    log_probs = logits.float().log_softmax(-1)
    chosen = log_probs.gather(-1, codes.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        hits = (log_probs.argmax(-1) == codes).float()
    return torch.stack([chosen, entropy, hits])
