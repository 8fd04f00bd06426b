"""Measures the seconds and bytes of drawing, from prompt to pixels, the shares of time, and the alternatives.

The base draws with transformers' own `generate` and guidance, as its documentation does. Janus has its own loop there, which
always makes a static cache and never compiles. `cache_implementation` only chooses whether that cache is offloaded, and
`compile_config` is not looked at. So its alternatives come from outside: a `DynamicCache` as an argument, and PyTorch's own
`Module.compile` on the language model.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import torch
from scoring.contenders import twin_of
from timing.models import TEXT_TOKENS, prompts
from timing.stopwatch import Measured, Watch, Work, fitting, in_turn, seconds_of
from torch import nn
from transformers import CompileConfig, DynamicCache, set_seed

from uc_adapters import UniCompressModel
from uc_adapters.steps import CACHE_NAME

ALTERNATIVES = ("dynamic", "static", "compiled")


def draw(model: nn.Module, batch: int, **options) -> torch.Tensor:
    """Draws a batch with guidance, and returns the pixels."""
    set_seed(0)
    tokens = model.generate(**prompts(model, batch), generation_mode="image", do_sample=True, guidance_scale=5.0, **options)
    return model.decode_image_tokens(tokens)


def _draw_dense_dynamically(base: nn.Module, batch: int) -> torch.Tensor:
    return draw(base, batch, **{CACHE_NAME: DynamicCache(config=base.config.get_text_config())})


def why_not_compiled(device: str) -> str | None:
    """The reason why torch.compile fails on a device; None if it works."""
    try:
        # The size is random, so that no cache has it and the compiler has to run.
        new = torch.zeros(random.randrange(2, 10**6), device=device)
        torch.compile(lambda x: x + 1, dynamic=False)(new)
    except Exception as error:  # TorchDynamo, its backend and a compiler each raise errors of their own
        return f"torch.compile fails here: {str(error).strip().splitlines()[0]}"
    return None


def alternatives(models: dict[str, nn.Module], chosen: list[str]) -> dict[str, dict[str, Callable[[int], object]]]:
    """The chosen alternatives: for each, functions by which base and "adapter" draw a batch of a given size."""
    base, adapter = models["base"], models["adapter"]
    on_gpu = base.device.type == "cuda"
    found: dict[str, dict[str, Callable[[int], object]]] = {}
    if "dynamic" in chosen:
        found["dynamic"] = {
            "base": partial(_draw_dense_dynamically, base),
            "adapter": partial(draw, adapter, cache_implementation="dynamic"),
        }
    if "static" in chosen:
        found["static"] = {
            "base": partial(draw, base),  # its default
            "adapter": partial(draw, adapter, cache_implementation="static", disable_compile=True),
        }
    if "compiled" in chosen:
        compiled_base = twin_of(base)
        compiled_base.model.language_model.compile(dynamic=False, mode="reduce-overhead" if on_gpu else None)
        options: dict = {"cache_implementation": "static"}
        if not on_gpu:
            options["compile_config"] = CompileConfig(dynamic=False, mode=None)
            options["compile_config"]._compile_all_devices = True  # else transformers compiles on GPUs alone
        found["compiled"] = {"base": partial(draw, compiled_base), "adapter": partial(draw, adapter, **options)}
    return found


def drawing_figures(
    models: dict[str, nn.Module], batch_sizes: list[int], repeats: int, warm_up: bool, chosen: list[str]
) -> dict:
    """The figures of drawing in turn: all sides in the default way, two in the chosen alternatives; None if out of memory."""
    device = models["base"].device.type
    left_out = {}
    if "compiled" in chosen and (reason := why_not_compiled(device)):
        chosen, left_out = [name for name in chosen if name != "compiled"], {"compiled": reason}
    ways = {"default": {name: partial(draw, model) for name, model in models.items()}, **alternatives(models, chosen)}
    measured: dict[str, dict[str, dict[str, Measured | None]]] = {}
    for batch in batch_sizes:
        works: dict[str, Work] = {
            f"{way} {name}": partial(work, batch) for way, of in ways.items() for name, work in of.items()
        }
        if "compiled" in ways and not warm_up:  # the time to compile is not part of a drawing
            for name in ways["compiled"]:
                fitting(works[f"compiled {name}"])
        taken = in_turn(works, repeats, f"draw {batch} in turn", warm_up)
        measured[str(batch)] = {way: {name: taken[f"{way} {name}"] for name in of} for way, of in ways.items()}

    def seconds(way: str) -> dict[str, dict[str, float | None]]:
        return {
            batch: {name: found and found.seconds for name, found in by_way[way].items()} for batch, by_way in measured.items()
        }

    first = seconds("default")[str(batch_sizes[0])]
    return {
        "seconds": first,
        "ratio": first["base"] / first["adapter"] if all(first.values()) else None,
        "by_batch": seconds("default"),
        "alternatives": {way: seconds(way) for way in ways if way != "default"},
        "left_out": left_out,
        "peak_bytes": {
            batch: {name: found and found.peak_bytes for name, found in by_way["default"].items()}
            for batch, by_way in measured.items()
        },
    }


def drawing_shares(model: nn.Module, warm_up: bool) -> dict[str, float]:
    """The share of each part in the time of one drawing."""
    if warm_up:
        draw(model, 1)
    compact = isinstance(model, UniCompressModel)
    base = model.get_base_model().model if compact else model.model
    parts = {
        "language model": [base.language_model],
        "code head": [base.generation_head.get_base_layer() if compact else base.generation_head],
        "image decoder": [base.vqmodel.post_quant_conv, base.vqmodel.decoder],
    }
    if compact:
        decompressor = model.code_head.module.decompressor
        parts["decompressor"] = [module for module in decompressor.modules() if not list(module.children())]
    watch = Watch(parts)
    with watch.watching():
        total = seconds_of(lambda: draw(model, 1))
    shares = {name: watch.seconds[name] / total for name in parts}
    return shares | {"everything else": 1 - sum(shares.values())}


def token_bytes(model: UniCompressModel) -> int:
    """The bytes of the keys and values of one token."""
    text = model.get_base_model().config.text_config
    width = text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    return 2 * text.num_hidden_layers * width * model.dtype.itemsize


def drawing_cache_bytes(models: dict[str, nn.Module], batch: int) -> dict[str, int]:
    """The bytes of keys and values of a guided drawing: prompts, their unconditional copies, and the inputs after both."""
    adapter = models["adapter"]
    side = adapter.family.geometry.draw_side
    found = {}
    for name, model in models.items():
        # transformers' static cache has room for the last token, too; the adapter never feeds it
        fed = side**2 if name == "base" else model.active_peft_config.num_gen_tokens((side, side)) - 1
        found[name] = 2 * batch * (TEXT_TOKENS + fed) * token_bytes(adapter)
    return found
