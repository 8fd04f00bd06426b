"""What evaluate.py shows of its scores: a markdown table, and a picture of drawings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from digits import QUESTION_KINDS, Scene
from PIL import Image
from sample_pictures import save_grid
from scene_scores import DrawingScore, drawing_prompts, render

ASPECTS = {
    "cells": "cells right",
    "digit": "the digit, where one was asked",
    "colour": "the colour, where one was asked",
    "position": "filled where asked, empty elsewhere",
    "emptiness": "empty, where nothing was asked",
    "count": "number of digits, of scenes",
    "scenes": "whole scenes right",
}
COLUMNS = 8  # of the picture


def markdown(scores: dict) -> str:
    """The table of the scores that `evaluate.py --json` writes: a column for each contender, and what differs."""
    names, differences = list(scores["reading"]), scores.get("differences", {})
    rows: list[tuple[str, list[str], str]] = []

    def add(label: str, cells: Callable[[str], str], difference: str = "") -> None:
        rows.append((label, [cells(name) for name in names], difference))

    def shares(label: str, key: str, what: str, headline: str = "") -> None:
        difference = _estimate(differences[headline], 100) if headline in differences else ""
        add(label, lambda name: _share(scores[key][name].get(what)), difference)

    add("tokens to read an image", lambda name: str(scores["tokens"]["read"][name]))
    if "drawing" in scores:
        add("steps of the language model to draw one", lambda name: str(scores["tokens"]["drawn"][name]))
    shares("reading: mean of three kinds", "reading_by_kind", "mean", "reading")
    for kind in QUESTION_KINDS:
        shares(f"reading: {kind}", "reading_by_kind", kind)
    if "drawing" in scores:
        for aspect, label in ASPECTS.items():
            shares(f"drawing: {label}", "drawing_by_aspect", aspect, "drawing" if aspect == "cells" else "")
        nats = _estimate(differences["nats_per_image"]) if differences else ""
        add("nats an image", lambda name: _estimate(scores["nats"][name]), nats)
        real = scores["feature_distance_of_real"]
        add(f"drawing: feature distance (other real scans: {real:.2f})", lambda name: f"{scores['feature_distance'][name]:.2f}")
        restored = scores["reconstruction"]
        add("reconstruction: cells right", lambda name: f"{100 * restored[name]['cells']:.1f} %")
        add("reconstruction: PSNR (dB)", lambda name: f"{restored[name]['psnr']:.1f}")
        add("reconstruction: SSIM", lambda name: f"{restored[name]['ssim']:.3f}")
        add("reconstruction: feature distance", lambda name: f"{restored[name]['feature_distance']:.2f}")
        batch = scores["settings"]["batch_size"]
        add(f"ms an image, batches of {batch}", lambda name: f"{1000 * scores['seconds_per_image'][name]:.1f}")
    head = ["", *names, *(["adapter - base"] if differences else [])]
    lines = [[label, *cells, *([difference] if differences else [])] for label, cells, difference in rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])
    environment = ", ".join(f"{name} {value}" for name, value in scores["environment"].items())
    return f"{table}\n\n{scores['dataset']}; in brackets, 95 % intervals; {environment}"


def save_drawings(scenes: list[Scene], seed: int, drawn: dict[str, DrawingScore], path: Path) -> None:
    """A PNG of the first scenes: real above, then what each contender drew for the same prompt, which is the title."""
    rows = {"the scene (real scans)": [Image.fromarray(pixels) for pixels in render(scenes[:COLUMNS])]}
    for name, score in drawn.items():
        cells, whole = (100 * score.estimates[aspect].value for aspect in ("cells", "scenes"))
        label = f"{name}: {score.seconds:.3f} s an image\n{cells:.1f} % of cells, {whole:.1f} % of scenes"
        rows[label] = [Image.fromarray(pixels) for pixels in score.images[:COLUMNS]]
    save_grid(rows, drawing_prompts(scenes, seed)[:COLUMNS], path)


def _share(estimate: dict | None) -> str:
    return "" if estimate is None else f"{100 * estimate['value']:.1f} % {_interval(estimate, 100)}"


def _estimate(estimate: dict, scale: float = 1) -> str:
    return f"{scale * estimate['value']:.1f} {_interval(estimate, scale)}"


def _interval(estimate: dict, scale: float) -> str:
    return f"({scale * estimate['low']:.1f} to {scale * estimate['high']:.1f})"
