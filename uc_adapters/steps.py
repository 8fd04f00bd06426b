"""The steps of the language model in one drawing: what they share is a cache, a mask and positions that are made once."""

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
CACHE_NAME = ALL_CACHE_NAMES[0]  # of a cache among a model's arguments: "past_key_values", from transformers 5.24 on "cache"
ROUND = 64  # static caches are as long as the next multiple: prompts of nearly one length share what was compiled


class Steps:
    """Feeds the language model behind what its cache holds; nothing in a step waits for the device.

    Args:
        family: The base.
        mask: Of the prompts, (B, L), padding on their left: it takes no position.
        position_deltas: By how many positions each token behind the prompts stands behind the one before it, (places,).
        config: As transformers' own `generate` reads it. `cache_implementation="static"` makes room for all keys and values at
            the start, and compiles the steps on a GPU, into CUDA graphs unless `compile_config` says otherwise;
            `disable_compile` leaves them as they are. Default "dynamic": the cache grows, nothing is compiled.

    Raises:
        UnsupportedError: Another `cache_implementation`.
    """

    def __init__(self, family: Family, mask: torch.Tensor, position_deltas: torch.Tensor, config: GenerationConfig):
        chosen = config.cache_implementation or "dynamic"
        if chosen not in CACHES:
            raise UnsupportedError(f"cache_implementation={chosen!r} cannot hold a drawing; expected {' or '.join(CACHES)}.")
        self.family, self.seen = family, 0
        self.text_config = family.base.config.get_text_config()
        self.padded = not bool(mask.all())
        self.static = chosen == "static"
        length = mask.shape[1] + len(position_deltas)
        if self.static:
            length = -(-length // ROUND) * ROUND
            self.cache: Cache = StaticCache(self.text_config, max_cache_len=length)
        else:
            self.cache = DynamicCache(config=self.text_config)
        self.mask = F.pad(mask, (0, length - mask.shape[1]), value=1)  # (B, length)
        prompts = (mask.cumsum(1) - 1).clamp(min=0)  # (B, L)
        positions = torch.cat([prompts, prompts[:, -1:] + position_deltas.cumsum(0)], 1)  # (B, L + places)
        self.positions = F.pad(positions, (0, length - positions.shape[1]))  # (B, length): steps of one layout compile once
        compiles = family.base._valid_auto_compile_criteria({CACHE_NAME: self.cache}, config)
        # Of fixed shapes unless the user says otherwise: one token, or two where a known one rides along
        self.compile_kwargs = (config.compile_config or CompileConfig(dynamic=False)).to_dict() if compiles else None
        self._language_model = self.compiled(_last_hidden)

    def compiled(self, function: Callable) -> Callable:
        """The function, compiled if the steps are."""
        return function if self.compile_kwargs is None else torch.compile(function, **self.compile_kwargs)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Feeds inputs (B, n, D); returns the last hidden state (B, D)."""
        first, self.seen = self.seen, self.seen + inputs.shape[1]
        positions = self.positions[:, first : self.seen]
        if first == 0:
            hidden = _last_hidden(self.family, inputs, self.mask[:, : self.seen], positions, self.cache)
            return hidden.clone(memory_format=torch.contiguous_format)  # a slice's layout tells of the prompt's length
        hidden = self._language_model(self.family, inputs, self._mask_of(inputs, positions), positions, self.cache)
        return hidden.clone() if self.compile_kwargs is not None else hidden  # a CUDA graph's output is overwritten

    def _mask_of(self, inputs: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        if not self.static and not self.padded:
            return None
        # Made here: the model itself would look into the mask for padding, and so wait for the device
        return create_causal_mask(
            self.text_config,
            inputs,
            self.mask if self.static else self.mask[:, : self.seen],
            self.cache,
            positions,
            allow_is_causal_skip=False,
        )


def _last_hidden(
    family: Family, inputs: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, cache: Cache
) -> torch.Tensor:
    output = family.language_model(
        inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=True, **{CACHE_NAME: cache}
    )
    return output.last_hidden_state[:, -1]
