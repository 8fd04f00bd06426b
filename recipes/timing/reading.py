"""Measures the seconds and bytes of reading an image, and the cost of a disabled adapter."""

from __future__ import annotations

from functools import partial

import torch
from timing.drawing import token_bytes
from timing.models import TEXT_TOKENS, prompts, random_pixels
from timing.stopwatch import Work, fitting, in_turn
from torch import nn

from uc_adapters import UniCompressModel

NEW_TOKENS = 16  # tokens of an answer
PHASES = ("prefill", "first token", "answer")


def answer(model: nn.Module, inputs: dict[str, torch.Tensor], tokens: int) -> torch.Tensor:
    """Generates exactly `tokens` tokens after a prompt, greedily."""
    return model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


def reading_works(models: dict[str, nn.Module], batch: int) -> dict[str, dict[str, Work]]:
    """The work to time: the language model's prefill alone, everything up to the first token, and whole answers."""
    pixels = random_pixels(models["base"], batch)
    dense = models["adapter"].family.geometry.read_side ** 2
    works: dict[str, dict[str, Work]] = {phase: {} for phase in PHASES}
    for name, model in models.items():
        count = dense if name == "base" else model.num_image_tokens
        inputs = prompts(model, batch, count) | {"pixel_values": pixels}
        core = model.model if name == "base" else model.get_base_model().model
        embedded = torch.randn(batch, count + TEXT_TOKENS, core.config.text_config.hidden_size, device=pixels.device)
        embedded = embedded.to(pixels.dtype)

        works["prefill"][name] = partial(core.language_model, inputs_embeds=embedded, use_cache=True)
        works["first token"][name] = partial(answer, model, inputs, 1)
        works["answer"][name] = partial(answer, model, inputs, NEW_TOKENS)
    return works


def read_in_turn(models: dict[str, nn.Module], batch: int, repeats: int, warm_up: bool) -> dict[str, dict[str, float | None]]:
    """The seconds of each phase of reading a batch, all sides in turn; None if out of memory.

    A single prompt always has a warm-up and at least three turns, because it takes seconds where a drawing takes minutes.
    """
    few = batch == 1
    works = fitting(partial(reading_works, models, batch))
    seconds: dict[str, dict[str, float | None]] = {phase: dict.fromkeys(models) for phase in PHASES}
    for phase in PHASES if works else ():
        turns = max(3, repeats) if few else repeats
        measured = in_turn(works[phase], turns, f"read {batch}, {phase}, in turn", few or warm_up)
        seconds[phase] = {name: found and found.seconds for name, found in measured.items()}
    return seconds


def tokens_per_second(seconds: dict[str, dict[str, float | None]], batch: int) -> dict[str, float | None]:
    """The tokens of a whole batch in a second, after the first token, from what `read_in_turn` returns."""
    rates = {}
    for name, first in seconds["first token"].items():
        whole = seconds["answer"][name]
        rates[name] = batch * (NEW_TOKENS - 1) / (whole - first) if first and whole else None
    return rates


def image_cache_bytes(model: UniCompressModel) -> dict[str, int]:
    """The bytes of keys and values that one image leaves in the cache."""
    return {
        "base": model.family.geometry.read_side**2 * token_bytes(model),
        "adapter": model.num_image_tokens * token_bytes(model),
    }


def disabled_over_bare(models: dict[str, nn.Module], repeats: int) -> float | None:
    """The ratio of seconds of a disabled adapter to the bare base, for the language model on one image's tokens.

    None if they do not fit in memory.
    """
    core = models["base"].model
    count = models["adapter"].family.geometry.read_side ** 2
    embedded = torch.randn(1, count, core.config.text_config.hidden_size, device=core.device, dtype=core.dtype)
    works = {
        "bare": partial(core.language_model, inputs_embeds=embedded),
        "disabled": partial(models["adapter"].get_base_model().model.language_model, inputs_embeds=embedded),
    }
    with models["adapter"].disable_adapter():
        measured = in_turn(works, repeats, "disabled against bare")
    if None in measured.values():
        return None
    return measured["disabled"].seconds / measured["bare"].seconds
