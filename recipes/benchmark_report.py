"""What `benchmark.py` found as a table and as a chart, base beside adapter."""

from __future__ import annotations

import matplotlib as mpl
from training_benchmark import training_rows

mpl.use("Agg")
import matplotlib.pyplot as plt  # behind the choice of backend: no screen is needed

Pair = dict[str, float | None]
WAYS = {"dynamic": "dynamic caches", "static": "static caches", "compiled": "compiled"}


def rows(figures: dict) -> list[tuple[str, str, Pair, bool]]:
    """What is compared, its unit, the figures of base and adapter (None: out of memory), and whether less is better."""
    if "training" in figures:
        return [(*row, True) for row in training_rows(figures)]
    drawing, reading, memory = figures["drawing"], figures["reading"], figures["memory"]
    found = [(f"drawing, prompt to pixels, batch {b}", "s", pair, True) for b, pair in drawing["by_batch"].items()]
    for way, by_batch in drawing["alternatives"].items():
        found += [(f"drawing, {WAYS[way]}, batch {b}", "s", pair, True) for b, pair in by_batch.items()]
    for b, phases in reading["by_batch"].items():
        found += [(f"reading, {phase}, batch {b}", "s", pair, True) for phase, pair in phases.items()]
    found += [
        (f"reading, after the first token, batch {b}", "tokens/s", pair, False)
        for b, pair in reading["tokens_per_second"].items()
    ]
    found.append(("keys and values, of an image", "MB", _megabytes(memory["cache_bytes"]), True))
    for what, by_batch in memory["drawing"].items():
        found += [(f"{what}, batch {b}", "MB", _megabytes(pair), True) for b, pair in by_batch.items()]
    return found


def _megabytes(pair: Pair) -> Pair:
    return {name: size and size / 1e6 for name, size in pair.items()}


def _gain(pair: Pair, less_is_better: bool) -> float | None:
    """How many times better the adapter is."""
    if not all(pair.values()):
        return None
    gain = pair["base"] / pair["adapter"]
    return gain if less_is_better else 1 / gain


def markdown(figures: dict) -> str:
    """The figures as a table, the adapter's gain beside them, and what could not be measured."""
    lines = ["| | base | adapter | gain |", "|---|---|---|---|"]
    for what, unit, pair, less_is_better in rows(figures):
        cells = ["out of memory" if pair[name] is None else f"{pair[name]:.3g}" for name in ("base", "adapter")]
        gain = _gain(pair, less_is_better)
        lines.append(f"| {what} ({unit}) | {' | '.join(cells)} | {'' if gain is None else f'{gain:.2f}'} |")
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
    """Bars of the figures, base beside adapter, four to a row; what ran out of memory is left to the table."""
    compared = [row for row in rows(figures) if all(row[2].values())]
    lines = -(-len(compared) // 4)
    figure, axes = plt.subplots(lines, 4, figsize=(9, 2.8 * lines), squeeze=False)
    for axis in axes.flat[len(compared) :]:
        axis.set_visible(False)
    for axis, (what, unit, pair, less_is_better) in zip(axes.flat, compared, strict=False):
        bars = axis.bar(list(pair), list(pair.values()), color=["#999999", "#2a7f62"])
        axis.bar_label(bars, [f"{value:.3g} {unit}" for value in pair.values()], fontsize=8)
        axis.set_title(f"{what.replace(', ', chr(10))}: {_gain(pair, less_is_better):.1f} x", fontsize=9)
        axis.set_yticks([])
        axis.margins(y=0.15)
        axis.spines[["top", "right", "left"]].set_visible(False)
    settings = figures["settings"]
    figure.suptitle(f"{settings['shape']}, {settings['dtype']}, {figures['hardware']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
