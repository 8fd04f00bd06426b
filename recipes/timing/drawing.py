"""Measures the seconds and bytes of drawing, from prompt to pixels, the shares of time, and the alternatives.

The base draws with transformers' own `generate` and guidance, as its documentation does. Janus has its own loop there, which
always makes a static cache and never compiles. `cache_implementation` only chooses whether that cache is offloaded, and
`compile_config` is not looked at. So its alternatives come from outside: a `DynamicCache` as an argument, and `torch.compile`
on the steps of the language model.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import torch
from scoring.contenders import twin_of
from timing.models import TEXT_TOKENS, prompts
from timing.stopwatch import Measured, Watch, Work, in_turn, seconds_of
from torch import nn
from transformers import CompileConfig, DynamicCache, set_seed

from uc_adapters import UniCompressModel
from uc_adapters.steps import CACHE_NAME

ALTERNATIVES = ("dynamic", "static", "compiled")
DECODED_AT_ONCE = 16  # images; the image decoder needs more memory for an image than the language model


def draw(model: nn.Module, batch: int, **options) -> torch.Tensor:
    """Draws a batch with guidance, and returns the pixels."""
    set_seed(0)
    tokens = model.generate(**prompts(model, batch), generation_mode="image", do_sample=True, guidance_scale=5.0, **options)
    return torch.cat([model.decode_image_tokens(part) for part in tokens.split(DECODED_AT_ONCE)])


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


def ways_to_draw(models: dict[str, nn.Module], chosen: list[str]) -> dict[str, dict[str, Callable[[int], object]]]:
    """The ways to draw, each with a function for each side that draws a batch of a given size.

    "default" has all sides. The chosen ways have "base", "adapter" and, if it is there, "fused"; "compiled" has either of both.
    """
    base, on_gpu = models["base"], models["base"].device.type == "cuda"
    adapters = {name: models[name] for name in ("adapter", "fused") if name in models}
    found: dict[str, dict[str, Callable[[int], object]]] = {
        "default": {name: partial(draw, model) for name, model in models.items()}
    }
    if "dynamic" in chosen:
        found["dynamic"] = {"base": partial(_draw_dense_dynamically, base)}
        found["dynamic"] |= {name: partial(draw, model, cache_implementation="dynamic") for name, model in adapters.items()}
    if "static" in chosen:
        options = {"cache_implementation": "static", "disable_compile": True}
        found["static"] = {"base": partial(draw, base)}  # its default
        found["static"] |= {name: partial(draw, model, **options) for name, model in adapters.items()}
    if "compiled" in chosen:
        options = {"cache_implementation": "static"}
        if not on_gpu:
            options["compile_config"] = CompileConfig(dynamic=False, mode=None)
            options["compile_config"]._compile_all_devices = True  # else transformers compiles on GPUs alone
        name = "fused" if "fused" in models else "adapter"  # to compile takes a minute
        found["compiled"] = {"base": partial(draw, _compiled_base(base)), name: partial(draw, models[name], **options)}
    return found


def _compiled_base(base: nn.Module) -> nn.Module:
    """A twin of the base with compiled steps: CUDA graphs on a GPU. As in transformers' text generation, prefill is not."""
    twin = twin_of(base)
    language_model = twin.model.language_model
    eager = language_model.forward
    compiled = torch.compile(eager, dynamic=False, mode="reduce-overhead" if base.device.type == "cuda" else None)

    def forward(*args, inputs_embeds: torch.Tensor, **kwargs):
        function = compiled if inputs_embeds.shape[1] == 1 else eager
        return function(*args, inputs_embeds=inputs_embeds, **kwargs)

    language_model.forward = forward
    return twin


def draw_in_turn(
    sides: dict[str, Callable[[int], object]], batch: int, repeats: int, warm_up: bool, way: str
) -> dict[str, Measured | None]:
    """Measures one way to draw a batch, all sides in turn; None if out of memory."""
    works: dict[str, Work] = {name: partial(work, batch) for name, work in sides.items()}
    return in_turn(works, repeats, f"draw {batch}, {way}, in turn", warm_up)


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
