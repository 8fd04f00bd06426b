"""The picture of what fewer steps cost and gain: NLL and quarters right against the steps, and seconds of a large base."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

LOOKS = {  # for each line: its label, the runs of train_ratios.py on it, colour and marker
    "fixed": ("an adapter for each", ("fixed-16", "fixed-8", "fixed-4", "fixed-2", "fixed-1"), "#0f766e", "D"),
    "meta": ("the same, with global tokens", ("meta-8", "meta-4"), "#3f7f99", "s"),
    "dial": ("a dial", ("dial",), "#c2410c", "o"),
    "long": ("a dial, twice the scenes", ("dial-2700",), "#a8a29e", "^"),
}


SECONDS = {"base": "unmodified\nbase", "fused": "4 codes a step,\nLoRA merged", "8": "8 codes"}  # contenders of benchmark.py


def ratios(runs: dict[str, dict], benchmark: dict) -> Figure:
    """Draws the scores of `train_ratios.py`, by the name of the run, and seconds of `benchmark.py --also 8 --fused true`."""
    figure = Figure(figsize=(14, 4), facecolor="#ffffff")
    FigureCanvasAgg(figure)
    left, right, last = figure.subplots(1, 3, width_ratios=[5, 5, 4])
    for label, names, colour, marker in LOOKS.values():
        points = sorted((point for name in names for point in runs[name]["scores"].values()), key=lambda point: point["steps"])
        steps = [point["steps"] for point in points]
        look = {"color": colour, "marker": marker, "ms": 7, "lw": 1.8, "label": label}
        errors = [1.96 * point["nats_standard_error"] for point in points]
        left.errorbar(steps, [point["nats"] for point in points], yerr=errors, capsize=3, **look)
        right.plot(steps, [100 * point["quarters"] for point in points], **look)
    _finish(left, "NLL (nats an image), lower is better")
    _finish(right, "quarters of a scene drawn right (%)")
    right.legend(frameon=False, loc="lower right")
    seconds = benchmark["drawing"]["by_batch"]["1"]
    bars = last.bar(list(SECONDS.values()), [seconds[name] for name in SECONDS], color="#0f766e", width=0.6)
    last.bar_label(bars, [f"{seconds[name]:.0f} s" + _gain(seconds, name) for name in SECONDS])
    last.margins(y=0.15)
    last.set_title("an image on Janus-Pro-1B's\nshape, two CPU cores", fontsize=11, loc="left", fontweight="bold")
    last.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(w_pad=3)
    return figure


def _gain(seconds: dict[str, float], name: str) -> str:
    return "" if name == "base" else f"\n{seconds['base'] / seconds[name]:.1f} x faster"


def _finish(axis: Axes, title: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks([4, 8, 16, 32, 64], ["4\n16 codes", "8\n8 codes", "16\n4 codes", "32\n2 codes", "64\n1 code a step"])
    axis.set_xlabel("steps of the language model for an image of 64 codes")
    axis.set_title(title, fontsize=11, loc="left", fontweight="bold")
    axis.grid(color="#e5e7eb", lw=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
