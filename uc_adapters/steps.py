"""The steps of the language model for one batch of images. Their cache, mask and position ids are made once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import Cache, CompileConfig, DynamicCache, GenerationConfig, StaticCache
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.masking_utils import create_causal_mask

from .errors import UnsupportedError
from .families import Family

CACHES = ("dynamic", "static")
CACHE_NAME = ALL_CACHE_NAMES[0]  # the model's argument for the cache: "past_key_values", and "cache" from transformers 5.24 on
ROUND = 64  # a static cache's length is rounded up to a multiple of it, so that prompts of similar length compile once


class Steps:
    """Feeds inputs to the language model, after those in its cache. No step waits for the device.

    Args:
        family: The family of the base.
        mask: The attention mask of the prompts, (B, L), with padding on the left. Padding has no position id of its own.
        position_deltas: By how much the position id grows at each token after the prompts, (tokens,) or (axes, tokens).
        prompt_positions: The position ids of the prompts, (B, L) or (axes, B, L). Default: each token adds one.
        config: A generation config, read as by transformers' own `generate`. `cache_implementation="static"` allocates all keys
            and values at the start. On a GPU it also compiles the steps, into CUDA graphs unless `compile_config` says
            otherwise; `disable_compile` prevents that. With "dynamic" the cache grows. Default: on a GPU a static cache, since
            attention over keys of a new length is slow there for the first time; elsewhere a growing one; neither compiled.

    Raises:
        UnsupportedError: `cache_implementation` is neither of the two.
    """

    def __init__(
        self,
        family: Family,
        mask: torch.Tensor,
        position_deltas: torch.Tensor,
        config: GenerationConfig,
        prompt_positions: torch.Tensor | None = None,
    ):
        chosen = config.cache_implementation or ("static" if mask.device.type == "cuda" else "dynamic")
        if chosen not in CACHES:
            raise UnsupportedError(f"cache_implementation={chosen!r} does not work for images; expected {' or '.join(CACHES)}.")
        self.family, self.seen = family, 0
        self.text_config = family.base.config.get_text_config()
        self.padded = not bool(mask.all())
        self.static = chosen == "static"
        length = mask.shape[1] + position_deltas.shape[-1]
        if self.static:
            length = -(-length // ROUND) * ROUND
            self.cache: Cache = StaticCache(self.text_config, max_cache_len=length)
        else:
            self.cache = DynamicCache(config=self.text_config)
        self.mask = F.pad(mask, (0, length - mask.shape[1]), value=1)  # (B, length)
        if prompt_positions is None:
            prompt_positions = (mask.cumsum(1) - 1).clamp(min=0).expand(*position_deltas.shape[:-1], *mask.shape)
        drawn = prompt_positions[..., -1:] + position_deltas.cumsum(-1).unsqueeze(-2)  # (..., B, tokens)
        positions = torch.cat([prompt_positions, drawn], -1)  # (..., B, L + tokens)
        self.positions = F.pad(positions, (0, length - positions.shape[-1]))  # (..., B, length): one layout, compiled once
        asked = config.cache_implementation is not None
        compiles = asked and family.base._valid_auto_compile_criteria({CACHE_NAME: self.cache}, config)
        # Shapes are fixed unless the user says otherwise: a step has one token, or two with a known one
        self.compile_kwargs = (config.compile_config or CompileConfig(dynamic=False)).to_dict() if compiles else None
        self._language_model = self.compiled(_last_hidden)

    def compiled(self, function: Callable) -> Callable:
        """Returns the function, compiled if the steps are compiled."""
        return function if self.compile_kwargs is None else torch.compile(function, **self.compile_kwargs)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Feeds inputs (B, n, D); returns the last hidden state (B, D)."""
        return self.states(inputs, 1).squeeze(1)

    def states(self, inputs: torch.Tensor, count: int) -> torch.Tensor:
        """Feeds inputs (B, n, D); returns the last `count` hidden states (B, count, D)."""
        first, self.seen = self.seen, self.seen + inputs.shape[1]
        positions = self.positions[..., first : self.seen]
        if first == 0:
            hidden = _last_hidden(self.family, inputs, self.mask[:, : self.seen], positions, self.cache, count)
            return hidden.clone(memory_format=torch.contiguous_format)  # the strides of a slice depend on the prompt's length
        hidden = self._language_model(self.family, inputs, self._mask_of(inputs), positions, self.cache, count)
        return hidden.clone() if self.compile_kwargs is not None else hidden  # the next step overwrites a CUDA graph's output

    def _mask_of(self, inputs: torch.Tensor) -> torch.Tensor | None:
        """Returns the attention mask of a step; None if the model needs none."""
        if not self.static and not self.padded:
            return None
        # The mask is made here because the model itself would check it for padding, and so wait for the device
        return create_causal_mask(
            self.text_config,
            inputs,
            self.mask if self.static else self.mask[:, : self.seen],
            self.cache,
            allow_is_causal_skip=False,
        )


def _last_hidden(
    family: Family, inputs: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, cache: Cache, count: int
) -> torch.Tensor:
    """Runs the language model on inputs (B, n, D); returns the hidden states of the last `count` ones, (B, count, D)."""
    output = family.language_model(
        inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=True, **{CACHE_NAME: cache}
    )
    return output.last_hidden_state[:, -count:]
