"""Shows the scores of evaluate_scenes.py: a markdown table, and a picture of drawings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from reporting.environment import in_words
from reporting.intervals import in_percent
from reporting.pictures import save_grid
from scoring.scene_scores import DrawingScore, drawing_prompts, render
from tiny_world.digits import QUESTION_KINDS, Scene

ASPECTS = {
    "digit": "the digit, where one was asked",
    "colour": "the colour, where one was asked",
    "position": "filled where asked, empty elsewhere",
    "emptiness": "empty, where nothing was asked",
    "count": "number of digits, of scenes",
    "scenes": "whole scenes right",
}
RECONSTRUCTION = {
    "quarters": ("quarters right", "{:.1f} %", 100),
    "psnr": ("PSNR (dB)", "{:.1f}", 1),
    "ssim": ("SSIM", "{:.3f}", 1),
    "feature_distance": ("feature distance", "{:.2f}", 1),
}
DIFFERENCE = "adapter - base"
PICTURES = 8  # pictures in a row


def markdown(scores: dict) -> str:
    """The table of the scores of `evaluate_scenes.py --json`: one column per contender, and one for the difference."""
    columns = [*scores["reading"], *([DIFFERENCE] if "differences" in scores else [])]
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[label, *(entries.get(column, "") for column in columns)] for label, entries in _rows(scores)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{scores['dataset']}; in brackets, 95 % intervals; {in_words(scores['environment'])}"


def _rows(scores: dict) -> Iterator[tuple[str, dict[str, str]]]:
    """The lines of the table: the label of each, and its entries by column."""

    def differing(what: str, scale: float) -> dict[str, str]:
        return {DIFFERENCE: _estimate(scores["differences"][what], scale)} if "differences" in scores else {}

    def figures(values: dict[str, float], form: str, scale: float = 1) -> dict[str, str]:
        return {name: form.format(scale * value) for name, value in values.items()}

    def shares(key: str, what: str) -> dict[str, str]:
        return {name: in_percent(estimates[what]) for name, estimates in scores[key].items() if what in estimates}

    yield "tokens to read an image", figures(scores["tokens"]["read"], "{}")
    if "drawing" in scores:
        yield "steps of the language model to draw one", figures(scores["tokens"]["drawn"], "{}")
    yield "reading: mean of three kinds", shares("reading_by_kind", "mean") | differing("reading", 100)
    for kind in QUESTION_KINDS:
        yield f"reading: {kind}", shares("reading_by_kind", kind)
    if "drawing" not in scores:
        return
    yield "drawing: quarters right", shares("drawing_by_aspect", "quarters") | differing("drawing", 100)
    for aspect, label in ASPECTS.items():
        yield f"drawing: {label}", shares("drawing_by_aspect", aspect)
    nats = {name: _estimate(estimate) for name, estimate in scores["nats"].items()}
    yield "NLL (nats an image)", nats | differing("nats_per_image", 1)
    other_scans = scores["feature_distance_of_real"]
    yield f"drawing: feature distance (other real scans: {other_scans:.2f})", figures(scores["feature_distance"], "{:.2f}")
    for what, (label, form, scale) in RECONSTRUCTION.items():
        values = {name: restored[what] for name, restored in scores["reconstruction"].items()}
        yield f"reconstruction: {label}", figures(values, form, scale)
    batches = f"batches of {scores['settings']['batch_size']}"
    yield f"ms an image, {batches}", figures(scores["seconds_per_image"], "{:.1f}", 1000)


def save_drawings(scenes: list[Scene], seed: int, drawn: dict[str, DrawingScore], path: Path) -> None:
    """Writes a PNG of the first scenes: real ones at the top, then each contender's drawings. The prompts are the titles."""
    rows = {"the scene (real scans)": [Image.fromarray(pixels) for pixels in render(scenes[:PICTURES])]}
    for name, score in drawn.items():
        quarters, whole = (100 * score.estimates[aspect].value for aspect in ("quarters", "scenes"))
        label = f"{name}: {score.seconds:.3f} s an image\n{quarters:.1f} % of quarters, {whole:.1f} % of scenes"
        rows[label] = [Image.fromarray(pixels) for pixels in score.images[:PICTURES]]
    save_grid(rows, drawing_prompts(scenes, seed)[:PICTURES], path)


def _estimate(estimate: dict, scale: float = 1) -> str:
    return "{:.1f} ({:.1f} to {:.1f})".format(*(scale * estimate[name] for name in ("value", "low", "high")))
