"""Measures a dense Janus and an adapter on it side by side in one run: seconds of drawing and reading, and memory.

    python recipes/benchmark.py --shape tiny --batch_sizes 1 8                     # two minutes: the shipped base and adapter
    python recipes/benchmark.py --shape janus-pro-1b --repeats 1 --warm_up false   # 20 to 40 minutes on two cores, 14 GiB
    python recipes/benchmark.py --shape tiny --also phase raster                    # other decompressors, in the same run
    python recipes/benchmark.py --shape janus-pro-1b --also 8 16 --measure drawing   # 8 and 16 codes in a step
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
from functools import partial
from pathlib import Path

import torch
import transformers
from reporting.environment import check_output, environment, is_here, make_current
from timing.drawing import (
    ALTERNATIVES,
    draw_in_turn,
    drawing_cache_bytes,
    drawing_shares,
    ways_to_draw,
    why_not_compiled,
)
from timing.largest import largest_batch
from timing.models import SHAPES, fused, prompts, random_pixels, sides
from timing.parts import Parts
from timing.reading import disabled_over_bare, image_cache_bytes, read_in_turn, tokens_per_second
from timing.report import draw_chart, markdown
from timing.stopwatch import Work, fitting, in_turn, seconds_of
from timing.training import training_figures
from torch import nn
from transformers import set_seed
from trl import TrlParser

from uc_adapters.config import DECOMPRESSORS

MEASURES = ("reading", "shares", "drawing")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class BenchmarkArguments:
    """What to time, and where."""

    shape: str = field(default="tiny", metadata={"help": "tiny, janus-pro-1b or janus-pro-7b."})
    decompressor: str = field(
        default="strip", metadata={"help": "Decompressor of an adapter with random weights; not with --shape tiny."}
    )
    also: list[str] = field(
        default_factory=list, metadata={"help": "More adapters, with random weights: decompressors, or codes in a step."}
    )
    fused: bool = field(
        default=False, metadata={"help": "Also draw and read with the adapter's LoRA merged; that of --also is merged, too."}
    )
    train: bool = field(default=False, metadata={"help": "Time a training step instead: LoRA on dense tokens, and stage 2."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Use it on both sides. Needs --train true."})
    batch_sizes: list[int] = field(default_factory=lambda: [1], metadata={"help": "Prompts at once. Training uses the first."})
    alternatives: list[str] = field(
        default_factory=list, metadata={"help": "Also draw in other ways: dynamic and static caches, compiled."}
    )
    measure: list[str] = field(
        default_factory=lambda: list(MEASURES), metadata={"help": "What to measure: reading, shares of the time, drawing."}
    )
    largest: bool = field(
        default=False, metadata={"help": "Also draw the largest batch that fits on the GPU. Needs two of --batch_sizes."}
    )
    limit: float | None = field(default=None, metadata={"help": "Seconds that one part of the figures may take."})
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
        lengths = [kind for kind in self.also if kind.isdigit() and int(kind) >= 1]
        expected = f"some of {', '.join(others)}, or numbers of codes in a step, from 1 on"
        self._require("also", set(self.also) <= {*others, *lengths}, expected)
        self._require("alternatives", set(self.alternatives) <= set(ALTERNATIVES), f"some of {', '.join(ALTERNATIVES)}")
        self._require("measure", self.measure and set(self.measure) <= set(MEASURES), f"some of {', '.join(MEASURES)}")
        self._require("repeats", self.repeats >= 1, "1 or more")
        self._require("batch_sizes", self.batch_sizes and min(self.batch_sizes) >= 1, "one or more, each 1 or more")
        self._require("device", is_here(self.device), "cpu, or the device of a GPU that is there, such as cuda")
        self._require("limit", self.limit is None or self.limit > 0, "a number of seconds above 0")
        if self.largest and (not self.device.startswith("cuda") or len(set(self.batch_sizes)) < 2):
            raise SystemExit("--largest true needs --device cuda and two or more --batch_sizes, from whose peaks it starts.")
        if self.largest and "drawing" not in self.measure:
            raise SystemExit("--largest true needs drawing among --measure, from whose peaks it starts.")
        if self.gradient_checkpointing and not self.train:
            raise SystemExit("--gradient_checkpointing true without --train true; expected both: only training has gradients.")
        of_drawing = {
            "also": " ".join(self.also),
            "alternatives": " ".join(self.alternatives),
            "fused": "true" * self.fused,
            "largest": "true" * self.largest,
        }
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
    for name in next(iter(by_batch.values()), {}):
        fits = [int(batch) for batch, seconds in by_batch.items() if seconds[name] is not None]
        failed = [int(batch) for batch, seconds in by_batch.items() if seconds[name] is None]
        found[name] = {"out_of_memory": failed, "largest_that_fits": max(fits, default=None)}
    return found


@torch.no_grad()
def measure_speed(models: dict[str, nn.Module], args: BenchmarkArguments, parts: Parts) -> None:
    """Measures drawing on all sides, and reading on base, "adapter" and "fused". The other adapters read as "adapter" does."""
    drawing: dict = {"by_batch": {}, "alternatives": {}, "first_compiled": {}, "largest": {}, "left_out": {}, "shares": {}}
    reading: dict = {"by_batch": {}, "tokens_per_second": {}}
    peaks: dict[str, dict[str, int | None]] = {}
    pair = {name: models[name] for name in ("base", "adapter")}
    memory = {
        "cache_bytes": image_cache_bytes(pair["adapter"]),
        "drawing": {
            "keys and values, of a drawing": {str(batch): drawing_cache_bytes(models, batch) for batch in args.batch_sizes},
            "drawing, peak beyond the weights": peaks,
        },
    }
    parts.figures |= {"drawing": drawing, "reading": reading, "memory": memory}

    readers = pair | {name: models[name] for name in models if name == "fused"}
    for batch in args.batch_sizes if "reading" in args.measure else ():
        with parts.part(f"read {batch}"):
            seconds = read_in_turn(readers, batch, args.repeats, args.warm_up)
            reading["by_batch"][str(batch)] = seconds
            reading["tokens_per_second"][str(batch)] = tokens_per_second(seconds, batch)
    # The shares come before the timed drawings, because they are their only warm-up if warm_up is false
    for name, model in models.items() if "shares" in args.measure else ():
        with parts.part(f"shares of {name}"):
            drawing["shares"][name] = fitting(partial(drawing_shares, model, args.warm_up))
    chosen = args.alternatives
    if "compiled" in chosen and (reason := why_not_compiled(args.device)):
        chosen, drawing["left_out"] = [way for way in chosen if way != "compiled"], {"compiled": reason}
    ways = ways_to_draw(models, chosen) if "drawing" in args.measure else {}
    for batch in args.batch_sizes:
        for way, sides_of_way in ways.items():
            if way == "compiled":
                first = drawing["first_compiled"].setdefault(str(batch), {})
                for name, work in sides_of_way.items():
                    with parts.part(f"compile {batch}, {name}"):
                        first[name] = fitting(partial(seconds_of, partial(work, batch)))
                sides_of_way = {name: work for name, work in sides_of_way.items() if name in first}  # those that compiled
            with parts.part(f"draw {batch}, {way}"):
                measured = draw_in_turn(sides_of_way, batch, args.repeats, args.warm_up and way != "compiled", way)
                by_batch = drawing["by_batch"] if way == "default" else drawing["alternatives"].setdefault(way, {})
                by_batch[str(batch)] = {name: found and found.seconds for name, found in measured.items()}
                if way == "default":
                    parts.figures["batches"] = batches(by_batch)
                    found = {name: found and found.peak_bytes for name, found in measured.items()}
                    if all(found.values()):
                        peaks[str(batch)] = found
    if "reading" in args.measure:
        with parts.part("a disabled adapter"):
            parts.figures["disabled_over_bare"] = disabled_over_bare(pair, 4 * max(3, args.repeats))
    for name, work in ways["default"].items() if args.largest else ():
        with parts.part(f"largest batch of {name}"):
            of_side = {int(batch): sides_of_batch[name] for batch, sides_of_batch in peaks.items()}
            batch, seconds = largest_batch(work, of_side) or (None, None)
            drawing["largest"][name] = {"batch": batch, "seconds": seconds}


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
    """Measures what the arguments ask for, and returns the figures.

    Raises:
        SystemExit: The models do not fit into memory, or a part failed. What the others measured is printed and written first.
    """
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
        models |= {kind: fused(models[kind]) for kind in args.also} | {"fused": fused(models["adapter"])}
    figures = environment(args.device) | {"settings": vars(args)}
    parts = Parts(figures, args.json, args.limit)
    if args.train:
        figures |= training_speed(models, args)
        parts.write()
    else:
        measure_speed(models, args, parts)
    print(f"{json.dumps(figures, indent=2)}\n\n{markdown(figures)}")
    if args.chart:
        draw_chart(figures, args.chart)
    if failed := figures.get("failed"):
        raise SystemExit("\n".join(f"{name} failed: {error}" for name, error in failed.items()))
    return figures


if __name__ == "__main__":
    main(*TrlParser(BenchmarkArguments).parse_args_and_config())
