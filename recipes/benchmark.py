"""Measures a dense Janus and an adapter on it side by side in one run: seconds of drawing and reading, and memory.

    python recipes/benchmark.py --shape tiny --batch_sizes 1 8                     # two minutes: the shipped base and adapter
    python recipes/benchmark.py --shape janus-pro-1b --repeats 1 --warm_up false   # 20 to 40 minutes on two cores, 14 GiB
    python recipes/benchmark.py --shape tiny --also phase raster                    # other decompressors, in the same run
    python recipes/benchmark.py --shape tiny --fused true                          # also the adapter with its LoRA merged
    python recipes/benchmark.py --shape janus-pro-7b --dtype bfloat16 --device cuda --batch_sizes 1 8 --alternatives compiled
    python recipes/benchmark.py --shape janus-pro-1b --train                       # a step of training: six minutes, 14 GiB

Needs: pip install -c constraints.txt -e ".[recipes]". Tested on two CPU cores; the line with cuda needs a GPU.
The base runs transformers' own `generate` without an adapter, and the adapter shares its weights. They take turns after a
warm-up of each, and the medians are reported. Drawing is timed end to end, from prompt to pixels. Janus-Pro's shapes have
random weights, which say nothing about quality; `evaluate_scenes.py` measures that. The shares of time come from a separate
drawing, because the hooks that measure them cost time. A batch that does not fit in memory is reported, and the run goes on.
docs/figures/speed.md explains each figure.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from reporting.environment import check_output, environment, is_here, make_current
from timing.drawing import ALTERNATIVES, drawing_cache_bytes, drawing_figures, drawing_shares
from timing.models import SHAPES, fused, prompts, random_pixels, sides
from timing.reading import disabled_over_bare, image_cache_bytes, reading_figures
from timing.report import draw_chart, markdown
from timing.stopwatch import Work, fitting, in_turn
from timing.training import training_figures
from torch import nn
from transformers import set_seed
from trl import TrlParser

from uc_adapters.config import DECOMPRESSORS

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class BenchmarkArguments:
    """What to time, and where."""

    shape: str = field(default="tiny", metadata={"help": "tiny, janus-pro-1b or janus-pro-7b."})
    decompressor: str = field(
        default="strip", metadata={"help": "Decompressor of an adapter with random weights; not with --shape tiny."}
    )
    also: list[str] = field(default_factory=list, metadata={"help": "More decompressors to draw with, with random weights."})
    fused: bool = field(default=False, metadata={"help": "Also draw and read with the adapter's LoRA merged."})
    train: bool = field(default=False, metadata={"help": "Time a training step instead: LoRA on dense tokens, and stage 2."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Use it on both sides. Needs --train true."})
    batch_sizes: list[int] = field(default_factory=lambda: [1], metadata={"help": "Prompts at once. Training uses the first."})
    alternatives: list[str] = field(
        default_factory=list, metadata={"help": "Also draw in other ways: dynamic and static caches, compiled."}
    )
    repeats: int = field(default=3, metadata={"help": "Timed turns of each side. Reading one prompt takes at least three."})
    warm_up: bool = field(default=True, metadata={"help": "Run each side once untimed. False if a drawing takes minutes."})
    dtype: str = field(default="float32", metadata={"help": "Dtype of the base: float32, bfloat16 or float16."})
    device: str = field(default="cpu", metadata={"help": "Torch device."})
    json: str | None = field(default=None, metadata={"help": "File to write the figures to."})
    chart: str | None = field(default=None, metadata={"help": "PNG file to draw the figures in."})

    def __post_init__(self):
        for name, allowed in {"shape": ("tiny", *SHAPES), "decompressor": DECOMPRESSORS, "dtype": DTYPES}.items():
            self._require(name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")
        if self.shape == "tiny":
            self._require("decompressor", self.decompressor == "strip", "strip with --shape tiny, which is the shipped adapter")
        others = [kind for kind in DECOMPRESSORS if kind != self.decompressor]
        self._require("also", set(self.also) <= set(others), f"some of {', '.join(others)}")
        self._require("alternatives", set(self.alternatives) <= set(ALTERNATIVES), f"some of {', '.join(ALTERNATIVES)}")
        self._require("repeats", self.repeats >= 1, "1 or more")
        self._require("batch_sizes", self.batch_sizes and min(self.batch_sizes) >= 1, "one or more, each 1 or more")
        self._require("device", is_here(self.device), "cpu, or the device of a GPU that is there, such as cuda")
        if self.gradient_checkpointing and not self.train:
            raise SystemExit("--gradient_checkpointing true without --train true; expected both: only training has gradients.")
        of_drawing = {"also": " ".join(self.also), "alternatives": " ".join(self.alternatives), "fused": "true" * self.fused}
        for name, chosen in of_drawing.items():
            if self.train and chosen:
                raise SystemExit(f"--{name} {chosen} with --train true; expected one of them: --{name} is for drawing only.")
        for name in ("json", "chart"):
            check_output(name, getattr(self, name))
        self._require("chart", self.chart is None or Path(self.chart).suffix == ".png", "a file that ends in .png")

    def _require(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise SystemExit(f"--{name} {getattr(self, name)!r} is not valid; expected {expected}.")


def batches(by_batch: dict[str, dict[str, float | None]]) -> dict[str, dict]:
    """For each side, the batch sizes of drawing that ran out of memory, and the largest one that fits."""
    found = {}
    for name in next(iter(by_batch.values())):
        fits = [int(batch) for batch, seconds in by_batch.items() if seconds[name] is not None]
        failed = [int(batch) for batch, seconds in by_batch.items() if seconds[name] is None]
        found[name] = {"out_of_memory": failed, "largest_that_fits": max(fits, default=None)}
    return found


@torch.no_grad()
def speed_figures(models: dict[str, nn.Module], args: BenchmarkArguments) -> dict:
    """The figures of drawing on all sides, and of reading on base, "adapter" and "fused".

    The other adapters read just as "adapter" does.
    """
    pair = {name: models[name] for name in ("base", "adapter")}
    readers = pair | {name: models[name] for name in models if name == "fused"}
    reading = reading_figures(readers, args.batch_sizes, args.repeats, args.warm_up)
    # This runs before the timed turns, because it is their only warm-up if warm_up is false
    shares = {name: fitting(lambda model=model: drawing_shares(model, args.warm_up)) for name, model in models.items()}
    drawing = drawing_figures(models, args.batch_sizes, args.repeats, args.warm_up, args.alternatives)
    drawing["shares"], peaks = shares, drawing.pop("peak_bytes")
    memory = {
        "cache_bytes": image_cache_bytes(pair["adapter"]),
        "drawing": {
            "keys and values, of a drawing": {str(batch): drawing_cache_bytes(models, batch) for batch in args.batch_sizes},
            "drawing, peak beyond the weights": {batch: peak for batch, peak in peaks.items() if all(peak.values())},
        },
    }
    return {
        "drawing": drawing,
        "reading": reading,
        "memory": memory,
        "batches": batches(drawing["by_batch"]),
        "disabled_over_bare": disabled_over_bare(pair, 4 * max(3, args.repeats)),
    }


def training_speed(models: dict[str, nn.Module], args: BenchmarkArguments) -> dict:
    """The figures of a training step on both sides, at one batch size.

    Raises:
        SystemExit: One of the sides runs out of memory, so there is nothing to compare.
    """
    base, batch = models["base"], args.batch_sizes[0]

    def timed(works: dict[str, Work], what: str) -> dict[str, float]:
        measured = in_turn(works, args.repeats, what, args.warm_up)
        if None in measured.values():
            raise MemoryError
        return {name: found.seconds for name, found in measured.items()}

    def work() -> dict:
        ids, pixels = prompts(base, batch)["input_ids"], random_pixels(base, batch)
        return training_figures(models, ids, pixels, args.gradient_checkpointing, timed)

    figures = fitting(work)
    if figures is None:
        raise SystemExit(
            f"--batch_sizes {batch}: training ran out of memory; expected a batch that fits. Choose a smaller one, or pass "
            "--gradient_checkpointing true."
        )
    return figures


def main(args: BenchmarkArguments) -> dict:
    transformers.logging.set_verbosity_error()  # transformers' generate warns about defaults that do not matter here
    set_seed(0)
    make_current(args.device)
    models = fitting(lambda: sides(args.shape, args.decompressor, args.also, getattr(torch, args.dtype), args.device))
    if models is None:
        raise SystemExit(
            f"--shape {args.shape} ran out of memory at {args.dtype}: base and adapter do not fit on {args.device}. "
            "Pass --dtype bfloat16, or choose a smaller shape."
        )
    if args.fused:
        models["fused"] = fused(models["adapter"])
    figures = training_speed(models, args) if args.train else speed_figures(models, args)
    figures |= environment(args.device) | {"settings": vars(args)}
    text = json.dumps(figures, indent=2)
    print(f"{text}\n\n{markdown(figures)}")
    if args.json:
        Path(args.json).write_text(text + "\n")
    if args.chart:
        draw_chart(figures, args.chart)
    return figures


if __name__ == "__main__":
    main(*TrlParser(BenchmarkArguments).parse_args_and_config())
