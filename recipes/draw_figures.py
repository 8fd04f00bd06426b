"""Draws pictures of the committed figures: frontier.png and token-flow.png for the README, and ratios.png for the docs.

    python recipes/draw_figures.py

Needs: pip install -c constraints.txt -e ".[recipes]". Two seconds. Run it again when the figures under docs/ change.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from reporting.ratios import ratios

DOCS = Path(__file__).parents[1] / "docs"
INK, SOFT, PAPER = "#1f2937", "#6b7280", "#ffffff"
BASE, OURS, PAPERS, OTHER = "#6b7280", "#0f766e", "#c2410c", "#3f7f99"
GLOBAL, SEPARATOR, POOLED = "#b45309", "#374151", "#0f766e"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass
class Point:
    """One contender of a scored run: the share of right quarters and its 95 % interval, in per cent, and the speed."""

    quality: float
    low: float
    high: float
    seconds: float
    steps: int  # steps of the language model per image


def points(scores: dict) -> dict[str, Point]:
    """Reads base, adapter and raster from `evaluate_scenes.py --json`. Only this function knows the file's keys."""
    found = {}
    for name, aspects in scores["drawing_by_aspect"].items():
        quality, low, high = (100 * aspects["quarters"][key] for key in ("value", "low", "high"))
        found[name] = Point(quality, low, high, scores["seconds_per_image"][name], scores["tokens"]["drawn"][name])
    return found


def drawing_seconds(benchmark: dict) -> dict[str, float]:
    """The seconds of one drawing, by contender, from `benchmark.py --json`."""
    return benchmark["drawing"]["by_batch"]["1"]


def frontier(scores: dict, benchmark: dict) -> Figure:
    """Draws, left, quality against speed on the tiny pair, from one run; right, the seconds on Janus-Pro-1B's shape."""
    figure = Figure(figsize=(10, 4.2), facecolor=PAPER)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1.75, 1])
    _draw_quality(left, points(scores))
    _draw_seconds(right, drawing_seconds(benchmark))
    figure.tight_layout(w_pad=3)
    return figure


def _draw_quality(axis, of: dict[str, Point]) -> None:
    looks = {
        "base": ("unmodified base", BASE, "o", (0, -14), "center", "top"),
        "adapter": ("adapter, strip\n(ours, the default)", OURS, "D", (0, -14), "center", "top"),
        "raster": ("adapter, raster\n(the paper's path)", PAPERS, "s", (14, 0), "left", "center"),
    }
    for name, (label, colour, marker, offset, horizontal, vertical) in looks.items():
        point, speed = of[name], of["base"].seconds / of[name].seconds
        bars = [[point.quality - point.low], [point.high - point.quality]]
        axis.errorbar(speed, point.quality, yerr=bars, fmt=marker, color=colour, ms=11, capsize=4, elinewidth=1.5, zorder=3)
        axis.annotate(
            f"{label}\n{point.quality:.1f} %, {1000 * point.seconds:.0f} ms, {point.steps} steps",
            (speed, point.quality),
            xytext=offset,
            textcoords="offset points",
            ha=horizontal,
            va=vertical,
            color=colour,
            fontsize=9.5,
            linespacing=1.35,
        )
    axis.set_xlim(0.9, 1.38)
    axis.set_ylim(52, 104)
    axis.set_xlabel("speed-up over the unmodified base, prompt to pixels")
    axis.set_ylabel("quarters of a scene drawn right (%)")
    axis.set_title("Trained tiny pair, 500 held-out scenes", fontsize=11, loc="left", fontweight="bold")
    axis.grid(color="#e5e7eb", lw=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_seconds(axis, of: dict[str, float]) -> None:
    looks = {"base": ("unmodified base", BASE), "adapter": ("strip", OURS), "phase": ("phase", OTHER)}
    names = [name for name in looks if name in of]
    for row, name in enumerate(names):
        colour = looks[name][1]
        axis.barh(row, of[name], color=colour, height=0.62)
        gain = "" if name == "base" else f"   {of['base'] / of[name]:.1f} x faster"
        inside = name == "base"
        axis.text(
            of[name] - 12 if inside else of[name] + 12,
            row,
            f"{of[name]:.0f} s{gain}",
            ha="right" if inside else "left",
            va="center",
            color=PAPER if inside else colour,
            fontsize=10,
            fontweight="bold",
        )
    axis.set_yticks(range(len(names)), [looks[name][0] for name in names])
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel("seconds to draw one image, 2 CPU cores")
    axis.set_title("Janus-Pro-1B's shape, random weights", fontsize=11, loc="left", fontweight="bold", x=-0.36)
    axis.spines[["top", "right", "left"]].set_visible(False)


def token_flow() -> Figure:
    """Draws how Janus-Pro's 576 image tokens become 149 tokens to read, and 144 steps to draw."""
    figure = Figure(figsize=(10, 5.3), facecolor=PAPER)
    FigureCanvasAgg(figure)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_xlim(0, 100)
    axis.set_ylim(0, 53)
    axis.axis("off")

    axis.text(2, 50, "Reading", fontsize=13, fontweight="bold", va="center")
    axis.text(14, 50, "an image becomes 4 + 1 + 144 = 149 tokens, not 576", fontsize=10.5, color=SOFT, va="center")
    _box(axis, 2, 36, 11, 9, "image", "384 x 384")
    _arrow(axis, 13.4, 40.5, 16.6)
    _box(axis, 17, 36, 13, 9, "vision tower", "frozen")
    _arrow(axis, 30.4, 40.5, 33.1)
    _grid(axis, 33.8, 36.2, 8.6, 6, [[BASE] * 6] * 6, alpha=0.55)
    axis.text(38.1, 34.3, "576 features", fontsize=9, ha="center", color=INK)
    _arrow(axis, 43.2, 40.5, 52.2)
    axis.text(47.5, 41.7, "extractor\nand pooling", fontsize=8.5, ha="center", va="bottom", color=POOLED)
    _tokens(axis, 53, 39, 4, GLOBAL)
    axis.text(56.1, 37.6, "4 global", fontsize=9, ha="center", va="top", color=GLOBAL)
    _tokens(axis, 60, 39, 1, SEPARATOR)
    axis.text(60.7, 42.9, "1 separator", fontsize=9, ha="center", va="bottom", color=SEPARATOR)
    _tokens(axis, 62.1, 39, 7, POOLED)
    axis.text(67.6, 37.6, "144 pooled", fontsize=9, ha="center", va="top", color=POOLED)
    axis.text(67.6, 35.6, "2 x 2 windows", fontsize=8.5, ha="center", va="top", color=SOFT)
    _arrow(axis, 73.4, 40.5, 80.2)
    axis.text(76.6, 41.7, "aligner", fontsize=8.5, ha="center", va="bottom", color=INK)
    _box(axis, 80.6, 36, 17, 9, "language model", "frozen, with LoRA")

    axis.plot([2, 98], [31.2, 31.2], color="#d1d5db", lw=1)

    axis.text(2, 27.8, "Drawing", fontsize=13, fontweight="bold", va="center")
    axis.text(
        14, 27.8, "144 steps of the language model, not 576; each step draws 4 codes", fontsize=10.5, color=SOFT, va="center"
    )
    _box(axis, 2, 13.5, 11, 9, "prompt", "text tokens")
    _arrow(axis, 13.4, 18, 16.6)
    _box(axis, 17, 13.5, 17, 9, "language model", "frozen, with LoRA")
    _arrow(axis, 34.4, 18, 41.1)
    axis.text(37.7, 19.2, "hidden\nstate", fontsize=8.5, ha="center", va="bottom", color=INK)
    _box(axis, 41.5, 13.5, 16, 9, "strip", "decompressor", colour=OURS)
    _arrow(axis, 57.9, 18, 61.1)
    _tokens(axis, 61.7, 16.5, 4, OURS)
    axis.text(64.9, 20.7, "next 4 codes,\nleft to right", fontsize=8.5, ha="center", va="bottom", color=OURS)
    _arrow(axis, 68.6, 18, 71.6)
    strip = [[OURS] * 6, [OURS] * 4 + ["#e5e7eb"] * 2] + [["#e5e7eb"] * 6] * 4
    _grid(axis, 72.2, 13.7, 8.6, 6, strip)
    axis.text(76.5, 11.6, "grid of 576 codes", fontsize=9, ha="center", color=INK)
    _arrow(axis, 81.4, 18, 84.2)
    _box(axis, 84.6, 13.5, 13, 9, "VQ decoder", "384 x 384")
    axis.plot([64.9, 64.9, 25.5], [16.1, 6.5, 6.5], color=OURS, lw=1.8, solid_joinstyle="round")
    axis.add_patch(_head((25.5, 6.5), (25.5, 13.3), OURS))
    axis.text(
        45.2,
        5.2,
        "mean of the four code embeddings: one input for the next step",
        fontsize=9,
        ha="center",
        va="top",
        color=OURS,
    )
    return figure


def _box(axis, x: float, y: float, width: float, height: float, title: str, note: str, colour: str = INK) -> None:
    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=1.1", fc="#f9fafb", ec=colour, lw=1.6, zorder=2
    )
    axis.add_patch(shape)
    axis.text(x + width / 2, y + height * 0.63, title, ha="center", va="center", fontsize=10.5, fontweight="bold", color=colour)
    axis.text(x + width / 2, y + height * 0.28, note, ha="center", va="center", fontsize=8.5, color=SOFT)


def _head(start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> FancyArrowPatch:
    return FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=colour, lw=1.8, shrinkA=0, shrinkB=0)


def _arrow(axis, x: float, y: float, end: float) -> None:
    axis.add_patch(_head((x, y), (end, y)))


def _tokens(axis, x: float, y: float, count: int, colour: str) -> None:
    for index in range(count):
        axis.add_patch(Rectangle((x + 1.55 * index, y), 1.3, 3, fc=colour, ec=PAPER, lw=0.8))


def _grid(axis, x: float, y: float, side: float, cells: int, colours: list[list[str]], alpha: float = 1.0) -> None:
    size = side / cells
    for row, line in enumerate(colours):
        for column, colour in enumerate(line):
            at = (x + column * size, y + (cells - 1 - row) * size)
            axis.add_patch(Rectangle(at, size, size, fc=colour, ec=PAPER, lw=1, alpha=alpha))


def main(output_dir: Path, dpi: int = 160) -> list[Path]:
    """Writes the pictures and returns their paths."""
    scores = json.loads((DOCS / "evaluation-tiny-janus.json").read_text())
    benchmark = json.loads((DOCS / "benchmark-janus-pro-1b.json").read_text())
    several = json.loads((DOCS / "benchmark-janus-pro-1b-ratios.json").read_text())
    runs = {file.stem: json.loads(file.read_text()) for file in (DOCS / "ratios").glob("*.json")}
    output_dir.mkdir(parents=True, exist_ok=True)
    written = []
    with mpl.rc_context(STYLE):
        figures = {
            "frontier": frontier(scores, benchmark),
            "token-flow": token_flow(),
            "ratios": ratios(runs, several),
        }
        for name, figure in figures.items():
            written.append(output_dir / f"{name}.png")
            figure.savefig(written[-1], dpi=dpi, metadata={"Software": None})  # so that the same figures give the same bytes
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=DOCS / "images", help="Folder to write the pictures to.")
    print(*main(parser.parse_args().output_dir), sep="\n")
