"""Shows the figures of `benchmark.py` as a table and as a chart, with the base beside the adapters."""

from __future__ import annotations

import matplotlib as mpl
from timing.training import table_rows

mpl.use("Agg")
import matplotlib.pyplot as plt  # after the choice of a backend that needs no screen

Sides = dict[str, float | None]
WAYS = {"dynamic": "dynamic caches", "static": "static caches", "compiled": "compiled"}


def rows(figures: dict) -> list[tuple[str, str, Sides, bool]]:
    """Rows of the table: what is compared, its unit, the sides' figures (None: out of memory), and whether less is better."""
    if "training" in figures:
        return [(*row, True) for row in table_rows(figures)]
    drawing, reading, memory = figures["drawing"], figures["reading"], figures["memory"]
    found = [(f"drawing, prompt to pixels, batch {b}", "s", sides, True) for b, sides in drawing["by_batch"].items()]
    for way, by_batch in drawing["alternatives"].items():
        found += [(f"drawing, {WAYS[way]}, batch {b}", "s", sides, True) for b, sides in by_batch.items()]
    for way, by_batch in {"default": drawing["by_batch"], **drawing["alternatives"]}.items():
        found += [
            (f"drawing{', ' + WAYS[way] if way in WAYS else ''}, batch {b}", "images/s", _rates(sides, int(b)), False)
            for b, sides in by_batch.items()
            if int(b) > 1
        ]
    if largest := drawing.get("largest"):
        sizes = {name: of["batch"] for name, of in largest.items()}
        rates = {name: of["batch"] and of["batch"] / of["seconds"] for name, of in largest.items()}
        found.append(("drawing, the largest batch that fits", "images", sizes, False))
        found.append(("drawing, the largest batch that fits", "images/s", rates, False))
    for b, phases in reading["by_batch"].items():
        found += [(f"reading, {phase}, batch {b}", "s", sides, True) for phase, sides in phases.items()]
    found += [
        (f"reading, after the first token, batch {b}", "tokens/s", sides, False)
        for b, sides in reading["tokens_per_second"].items()
    ]
    found.append(("keys and values, of an image", "MB", _megabytes(memory["cache_bytes"]), True))
    for what, by_batch in memory["drawing"].items():
        found += [(f"{what}, batch {b}", "MB", _megabytes(sides), True) for b, sides in by_batch.items()]
    return found


def _rates(sides: Sides, batch: int) -> Sides:
    return {name: seconds and batch / seconds for name, seconds in sides.items()}


def _megabytes(sides: Sides) -> Sides:
    return {name: size and size / 1e6 for name, size in sides.items()}


def _gain(sides: Sides, name: str, less_is_better: bool) -> float | None:
    """How many times better than the base a side is; None if one of the two is missing."""
    if not (sides["base"] and sides[name]):
        return None
    gain = sides["base"] / sides[name]
    return gain if less_is_better else 1 / gain


def _number(value: float) -> str:
    """A number with three significant digits, never as a power of ten."""
    return f"{float(f'{value:.3g}'):,.10g}"


def _cells(sides: Sides, name: str, less_is_better: bool) -> list[str]:
    """A side's figure and, except for the base, its gain. Both are empty if the side was not measured."""
    if name not in sides:
        return ["", ""]
    figure = "out of memory" if sides[name] is None else _number(sides[name])
    if name == "base":
        return [figure]
    gain = _gain(sides, name, less_is_better)
    return [figure, "" if gain is None else f"{gain:.2f}"]


def markdown(figures: dict) -> str:
    """A markdown table of the figures with each adapter's gain, and lines on what could not be measured."""
    found = rows(figures)
    names = list(found[0][2])  # the first row is drawing, which has all sides
    titles = [title for name in names for title in ([name] if name == "base" else [name, "gain"])]
    lines = [f"| | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for what, unit, sides, less_is_better in found:
        cells = [cell for name in names for cell in _cells(sides, name, less_is_better)]
        lines.append(f"| {what} ({unit}) | {' | '.join(cells)} |")
    for way, reason in figures.get("drawing", {}).get("left_out", {}).items():
        lines.append(f"\nLeft out: {WAYS[way]}, {reason}.")
    for name, found in figures.get("batches", {}).items():
        if found["out_of_memory"]:
            failed = ", ".join(map(str, found["out_of_memory"]))
            largest = found["largest_that_fits"]
            lines.append(
                f"\n{name}, batch {failed}: out of memory; the largest that fits is {largest or 'none of those asked'}."
            )
    return "\n".join(lines)


def draw_chart(figures: dict, path: str) -> None:
    """Writes a bar chart with four panels a row. Figures that ran out of memory are only in the table."""
    compared = [row for row in rows(figures) if len(row[2]) > 1 and all(row[2].values())]
    lines = -(-len(compared) // 4)
    figure, axes = plt.subplots(lines, 4, figsize=(9, 2.8 * lines), squeeze=False)
    for axis in axes.flat[len(compared) :]:
        axis.set_visible(False)
    for axis, (what, unit, sides, less_is_better) in zip(axes.flat, compared, strict=False):
        bars = axis.bar(list(sides), list(sides.values()), color=["#999999", "#2a7f62", *["#8fbfae"] * (len(sides) - 2)])
        axis.bar_label(bars, [_number(value) for value in sides.values()], fontsize=8)
        gain = _gain(sides, list(sides)[1], less_is_better)  # of the adapter, or of the merged one where it stands for it
        axis.set_title(f"{what.replace(', ', chr(10))} ({unit}): {gain:.1f} x", fontsize=9)
        axis.set_yticks([])
        axis.tick_params(axis="x", labelsize=8)
        axis.margins(y=0.15)
        axis.spines[["top", "right", "left"]].set_visible(False)
    settings = figures["settings"]
    figure.suptitle(f"{settings['shape']}, {settings['dtype']}, {figures['hardware']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
