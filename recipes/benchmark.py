"""Seconds and bytes of a dense Janus and of an adapter on it, side by side in one run: drawing, reading, memory.

    python recipes/benchmark.py --shape tiny                                       # a minute: the shipped base and adapter
    python recipes/benchmark.py --shape janus-pro-1b --repeats 1 --warm_up false   # ten minutes on two CPU cores, 12 GiB
    python recipes/benchmark.py --shape janus-pro-7b --dtype bfloat16 --device cuda --batch_sizes 1 8
    python recipes/benchmark.py --shape janus-pro-1b --train                       # a step of training: six minutes, 14 GiB

Needs: pip install -c constraints.txt -e ".[recipes]". Tested on two CPU cores; the line with cuda needs a GPU.
The base is transformers' own `generate`, bare, beside the adapter on the same weights; they take turns, after a warm-up of
each, and medians count. Drawing is end to end, from prompt to pixels. Janus-Pro's shapes have random weights, which say
nothing of quality: that is `evaluate.py`'s. Where the time goes is measured in a drawing of its own, since watching costs.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import matplotlib as mpl
import torch
import transformers
from contenders import twin_of
from torch import nn
from tqdm.auto import tqdm
from training_benchmark import training_figures, training_rows
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    set_seed,
)
from trl import TrlParser

from uc_adapters import UniCompressConfig, UniCompressModel, get_uc_model

mpl.use("Agg")
import matplotlib.pyplot as plt  # behind the choice of backend: no screen is needed

TEXT_TOKENS = 30  # of a question or a prompt
NEW_TOKENS = 16  # of an answer
CARDS = Path(__file__).parents[1] / "model_cards"


@dataclass
class BenchmarkArguments:
    """What to time, and where."""

    shape: str = field(default="tiny", metadata={"help": "tiny, janus-pro-1b or janus-pro-7b."})
    decompressor: str = field(default="cell", metadata={"help": "Of a random adapter. See UniCompressConfig."})
    train: bool = field(default=False, metadata={"help": "Time a step of training instead: LoRA on dense tokens, and stage 2."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "In training, on both sides."})
    batch_sizes: list[int] = field(default_factory=lambda: [1], metadata={"help": "Prompts at once; training takes the first."})
    repeats: int = field(default=3, metadata={"help": "Timed turns each."})
    warm_up: bool = field(default=True, metadata={"help": "Draw once untimed. False where one drawing takes minutes."})
    dtype: str = field(default="float32", metadata={"help": "Of the base."})
    device: str = field(default="cpu", metadata={"help": "Torch device."})
    json: str | None = field(default=None, metadata={"help": "File to write the figures to."})
    chart: str | None = field(default=None, metadata={"help": "PNG to draw them in."})


def text_config(hidden: int, layers: int, heads: int, intermediate: int) -> LlamaConfig:
    """The language model of a Janus-Pro."""
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=intermediate,
        vocab_size=102_400,
        max_position_embeddings=16_384,
    )


SHAPES = {
    "janus-pro-1b": text_config(2048, 24, 16, 5632),
    "janus-pro-7b": text_config(4096, 30, 32, 11_008),
}


def random_janus(text: LlamaConfig, dtype: torch.dtype, device: str) -> JanusForConditionalGeneration:
    """A Janus-Pro with random weights: SigLIP-L at 384 pixels, 24 x 24 codes of 16 384."""
    config = JanusConfig(
        text_config=text,
        vision_config=JanusVisionConfig(image_size=384, projection_dim=text.hidden_size),
        vq_config=JanusVQVAEConfig(projection_dim=text.hidden_size, image_token_embed_dim=text.hidden_size),
        image_token_id=3,
    )
    with torch.device(device):
        model = JanusForConditionalGeneration._from_config(config, dtype=dtype)
    model.generation_config = GenerationConfig(bos_token_id=1, pad_token_id=0, generation_kwargs={"boi_token_id": 2})
    return model.eval()


def contenders(args: BenchmarkArguments) -> dict[str, nn.Module]:
    """The bare base, and an adapter on the same weights."""
    if args.shape == "tiny":
        base = AutoModelForImageTextToText.from_pretrained(CARDS / "tiny-janus").to(args.device).eval()
    elif args.shape in SHAPES:
        base = random_janus(SHAPES[args.shape], getattr(torch, args.dtype), args.device)
    else:
        raise SystemExit(f"--shape {args.shape!r} is not known; expected tiny, {' or '.join(SHAPES)}.")
    if args.shape == "tiny":
        adapter = UniCompressModel.from_pretrained(twin_of(base), CARDS / "tiny-janus-uc4x")
    else:
        adapter = get_uc_model(twin_of(base), UniCompressConfig(decompressor=args.decompressor)).eval()
    return {"base": base, "adapter": adapter}


def prompts(model: nn.Module, batch: int, placeholders: int = 0) -> dict[str, torch.Tensor]:
    """Random words behind the sequence's begin; to read, behind an image's placeholders; to draw, before an image's begin."""
    config = model.generation_config
    words = torch.randint(5, 50, (batch, TEXT_TOKENS), device=model.device)  # no placeholder of an image
    words[:, 0] = config.bos_token_id
    if placeholders:
        image = torch.full((batch, placeholders), model.config.image_token_id, device=model.device)
        words = torch.cat([words[:, :1], image, words[:, 1:]], 1)
    else:
        words[:, -1] = config.generation_kwargs["boi_token_id"]
    return {"input_ids": words, "attention_mask": torch.ones_like(words)}


def random_pixels(base: nn.Module, batch: int) -> torch.Tensor:
    """Images of the base's size, (B, 3, H, W)."""
    size = base.config.vision_config.image_size
    return torch.randn(batch, 3, size, size, device=base.device, dtype=base.dtype)


class Watch:
    """Seconds spent inside parts of a model, by name: what a part calls counts for it alone."""

    def __init__(self, parts: dict[str, list[nn.Module]]):
        self.parts, self.seconds = parts, defaultdict(float)

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles, open_calls = [], []

        def start(*_) -> None:
            synchronize()
            open_calls.append(time.perf_counter())

        for name, modules in self.parts.items():

            def stop(*_, name=name) -> None:
                synchronize()
                taken = time.perf_counter() - open_calls.pop()
                self.seconds[name] += taken
                if open_calls:
                    open_calls[-1] += taken  # not of the part around it

            for module in modules:
                handles += [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]
        yield
        for handle in handles:
            handle.remove()


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object]) -> float:
    """Wall-clock seconds."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def in_turn(works: dict[str, Callable[[], object]], repeats: int, what: str, warm_up: bool = True) -> dict[str, float]:
    """Median seconds of each, taking turns, after a warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for turn in tqdm(range(repeats + warm_up), desc=what):
        for name, work in works.items():
            seconds = seconds_of(work)
            if turn >= warm_up:
                taken[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def draw(model: nn.Module, batch: int) -> torch.Tensor:
    """Pixels of as many drawings, guided."""
    set_seed(0)
    tokens = model.generate(**prompts(model, batch), generation_mode="image", do_sample=True, guidance_scale=5.0)
    return model.decode_image_tokens(tokens)


def answer(model: nn.Module, inputs: dict[str, torch.Tensor], tokens: int) -> torch.Tensor:
    """So many tokens behind a prompt, greedily."""
    return model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


def drawing_shares(adapter: UniCompressModel) -> dict[str, float]:
    """Where the adapter's drawing time goes, as shares of it."""
    base = adapter.get_base_model().model
    decompressor = adapter.drawing.module.decompressor
    leaves = [module for module in decompressor.modules() if not list(module.children())]
    watch = Watch(
        {
            "language model": [base.language_model],
            "decompressor": leaves,
            "code head": [base.generation_head.get_base_layer()],
            "image decoder": [base.vqmodel.post_quant_conv, base.vqmodel.decoder],
        }
    )
    with watch.watching():
        total = seconds_of(lambda: draw(adapter, 1))
    shares = {name: seconds / total for name, seconds in watch.seconds.items()}
    return shares | {"everything else": 1 - sum(shares.values())}


def reading_works(models: dict[str, nn.Module], batch: int) -> dict[str, dict[str, Callable[[], object]]]:
    """What is timed of reading: the language model's prefill alone, up to the first token, and whole answers."""
    pixels = random_pixels(models["base"], batch)
    dense = models["adapter"].family.geometry.read_side ** 2
    works: dict[str, dict[str, Callable[[], object]]] = {"prefill": {}, "first token": {}, "answer": {}}
    for name, model in models.items():
        count = model.num_image_tokens if name == "adapter" else dense
        inputs = prompts(model, batch, count) | {"pixel_values": pixels}
        core = model.get_base_model().model if name == "adapter" else model.model
        embedded = torch.randn(batch, count + TEXT_TOKENS, core.config.text_config.hidden_size, device=pixels.device)
        embedded = embedded.to(pixels.dtype)

        works["prefill"][name] = partial(core.language_model, inputs_embeds=embedded, use_cache=True)
        works["first token"][name] = partial(answer, model, inputs, 1)
        works["answer"][name] = partial(answer, model, inputs, NEW_TOKENS)
    return works


def cache_bytes(model: UniCompressModel) -> dict[str, int]:
    """Keys and values that one image leaves in the cache."""
    text = model.get_base_model().config.text_config
    width = text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    a_token = 2 * text.num_hidden_layers * width * model.dtype.itemsize
    return {"base": model.family.geometry.read_side**2 * a_token, "adapter": model.num_image_tokens * a_token}


def peak_bytes(work: Callable[[], object]) -> int | None:
    """The most GPU memory that was in use during `work`; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated()


def disabled_over_bare(models: dict[str, nn.Module], repeats: int) -> float:
    """Seconds of the base under a disabled adapter, over those of the bare base: the language model, one image's tokens."""
    core = models["base"].model
    count = models["adapter"].family.geometry.read_side ** 2
    embedded = torch.randn(1, count, core.config.text_config.hidden_size, device=core.device, dtype=core.dtype)
    works = {
        "bare": lambda: core.language_model(inputs_embeds=embedded),
        "disabled": lambda: models["adapter"].get_base_model().model.language_model(inputs_embeds=embedded),
    }
    with models["adapter"].disable_adapter():
        seconds = in_turn(works, 4 * repeats, "disabled against bare")
    return seconds["disabled"] / seconds["bare"]


def hardware(device: str) -> str:
    """The machine, in words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return f"{torch.get_num_threads()} CPU cores, {model.partition(': ')[2] or platform.processor() or platform.machine()}"


def rows(figures: dict) -> list[tuple[str, str, dict[str, float]]]:
    """What is compared, its unit, and the figures of base and adapter."""
    if "training" in figures:
        return training_rows(figures)
    seconds = [(f"drawing, prompt to pixels, batch {b}", "s", pair) for b, pair in figures["drawing"]["by_batch"].items()]
    seconds += [(f"reading, {what}", "s", pair) for what, pair in figures["reading"]["seconds"].items()]
    cache = {name: size / 1e6 for name, size in figures["memory"]["cache_bytes"].items()}
    return [*seconds, ("keys and values, of an image", "MB", cache)]


def markdown(figures: dict) -> str:
    """The figures as a table, the adapter's gain beside them."""
    lines = ["| | base | adapter | base / adapter |", "|---|---|---|---|"]
    for what, unit, pair in rows(figures):
        ratio = pair["base"] / pair["adapter"]
        lines.append(f"| {what} ({unit}) | {pair['base']:.3g} | {pair['adapter']:.3g} | {ratio:.2f} |")
    return "\n".join(lines)


def draw_chart(figures: dict, path: str) -> None:
    """Bars of the figures, base beside adapter."""
    compared = rows(figures)
    figure, axes = plt.subplots(1, len(compared), figsize=(2.2 * len(compared), 3.2))
    for axis, (what, unit, pair) in zip(axes, compared, strict=True):
        bars = axis.bar(list(pair), list(pair.values()), color=["#999999", "#2a7f62"])
        axis.bar_label(bars, [f"{value:.3g} {unit}" for value in pair.values()], fontsize=8)
        axis.set_title(f"{what.replace(', ', chr(10))}: {pair['base'] / pair['adapter']:.1f} x", fontsize=9)
        axis.set_yticks([])
        axis.margins(y=0.15)
        axis.spines[["top", "right", "left"]].set_visible(False)
    settings = figures["settings"]
    figure.suptitle(f"{settings['shape']}, {settings['dtype']}, {figures['hardware']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


@torch.no_grad()
def speed_figures(models: dict[str, nn.Module], args: BenchmarkArguments) -> dict:
    """Drawing, reading, memory."""
    by_batch, reading, peaks = {}, {}, {}
    for what, works in reading_works(models, args.batch_sizes[0]).items():
        reading[what] = in_turn(works, args.repeats, f"reading, {what}, in turn")
    for batch in args.batch_sizes:
        works = {name: partial(draw, model, batch) for name, model in models.items()}
        by_batch[str(batch)] = in_turn(works, args.repeats, f"draw {batch} in turn", args.warm_up)
        peaks[str(batch)] = {name: peak_bytes(work) for name, work in works.items()}
    first = by_batch[str(args.batch_sizes[0])]
    tokens = {name: (NEW_TOKENS - 1) / (reading["answer"][name] - reading["first token"][name]) for name in models}
    return {
        "drawing": {
            "seconds": first,
            "ratio": first["base"] / first["adapter"],
            "by_batch": by_batch,
            "adapter_shares": drawing_shares(models["adapter"]),
        },
        "reading": {"seconds": reading, "tokens_per_second_after_the_first": tokens},
        "memory": {"cache_bytes": cache_bytes(models["adapter"]), "peak_bytes_drawing": peaks},
        "disabled_over_bare": disabled_over_bare(models, args.repeats),
    }


def main(args: BenchmarkArguments) -> dict:
    if args.gradient_checkpointing and not args.train:
        raise SystemExit("--gradient_checkpointing true without --train true; expected both: only training has gradients.")
    transformers.logging.set_verbosity_error()  # stock drawing warns of defaults that do not matter here
    set_seed(0)
    models = contenders(args)
    if args.train:
        base, batch = models["base"], args.batch_sizes[0]
        words, pixels = prompts(base, batch)["input_ids"], random_pixels(base, batch)
        timed = partial(in_turn, repeats=args.repeats, warm_up=args.warm_up)
        figures = training_figures(models, words, pixels, args.gradient_checkpointing, timed)
    else:
        figures = speed_figures(models, args)
    figures |= {
        "hardware": hardware(args.device),
        "versions": {package: version(package) for package in ("torch", "transformers", "peft", "uc-adapters")},
        "date": date.today().isoformat(),
        "settings": vars(args),
    }
    text = json.dumps(figures, indent=2)
    print(f"{text}\n\n{markdown(figures)}")
    if args.json:
        Path(args.json).write_text(text + "\n")
    if args.chart:
        draw_chart(figures, args.chart)
    return figures


if __name__ == "__main__":
    main(*TrlParser(BenchmarkArguments).parse_args_and_config())
