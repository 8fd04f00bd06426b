"""Scores on scenes of held-out digits: reading, drawing, reconstruction."""

from __future__ import annotations

import math

import numpy as np
import torch
from contenders import Contender, answer, draw, grid_of
from digits import QUESTION_KINDS, Scene, judge, right_cells
from stock_calls import base_of, calls_of, to_images
from tqdm.auto import tqdm

from uc_adapters import UniCompressModel
from uc_adapters.families import family_of

SPLIT = "held-out"


def score_reading(contender: Contender, scenes: list[Scene], seed: int) -> dict[str, float]:
    """Exact match by kind of question, and their mean."""
    scores = {}
    for kind in QUESTION_KINDS:
        rng = np.random.default_rng(seed)
        asked = [(scene, pair) for scene in scenes if (pair := scene.question(kind, rng))]
        right = 0
        for first in tqdm(range(0, len(asked), 50), desc=f"{contender.name} reads: {kind}", leave=False):
            rows = asked[first : first + 50]
            answers = answer(contender, [scene.image(SPLIT) for scene, _ in rows], [question for _, (question, _) in rows])
            right += sum(told == truth for told, (_, (_, truth)) in zip(answers, rows, strict=True))
        scores[kind] = right / len(asked)
    return {"mean": sum(scores.values()) / len(scores), **scores}


def score_drawing(
    pair: list[Contender], scenes: list[Scene], seed: int, batch_size: int, **sampling
) -> dict[str, dict[str, float]]:
    """Cells and scenes drawn right, and seconds an image: each batch by the base, then by the adapter."""
    rng = np.random.default_rng(seed)
    prompts = [scene.shuffled_caption(rng) for scene in scenes]
    totals = {contender.name: {"cells": 0.0, "scenes": 0.0, "seconds": 0.0} for contender in pair}
    torch.manual_seed(seed)
    for contender in pair:
        draw(contender, prompts[:batch_size], **sampling)  # warm-up
    for first in tqdm(range(0, len(scenes), batch_size), desc="draw, in turn"):
        batch = slice(first, first + batch_size)
        for contender in pair:
            images, seconds = draw(contender, prompts[batch], **sampling)
            drawn = judge(np.stack([np.asarray(image) for image in images]))
            right = [right_cells(asked, seen) for asked, seen in zip(scenes[batch], drawn, strict=True)]
            total = totals[contender.name]
            total["cells"] += sum(right) / 4
            total["scenes"] += sum(cells == 4 for cells in right)
            total["seconds"] += seconds
    return {name: {key: value / len(scenes) for key, value in total.items()} for name, total in totals.items()}


@torch.no_grad()
def score_reconstruction(contender: Contender, scenes: list[Scene]) -> dict[str, float]:
    """Real scenes through the tokenizer alone: to codes (the adapter: to compact codes and back), then to pixels."""
    model = contender.model
    drawing = model.drawing if isinstance(model, UniCompressModel) else None
    family, calls, grid = family_of(base_of(model)), calls_of(model), grid_of(contender)
    right, error, count = 0, 0.0, 0
    for first in range(0, len(scenes), 50):
        rows = scenes[first : first + 50]
        truth = np.stack([scene.render(SPLIT) for scene in rows])
        pixels = contender.processor.image_processor(list(truth), return_tensors="pt")["pixel_values"].to(model.device)
        if drawing is None:
            tokens = family.dense_codes(pixels)
        else:
            codes = drawing.compress(pixels)
            tokens = drawing.expand(codes.globals, codes.cells, grid, lambda logits: logits.argmax(-1))
        images = to_images(contender.processor, calls.pixels(model, family.to_tokens(tokens, grid), grid))
        restored = np.stack([np.asarray(image) for image in images])
        right += sum(right_cells(a, b) for a, b in zip(rows, judge(restored), strict=True))
        error += float(np.square((restored.astype(np.float64) - truth) / 255).mean((1, 2, 3)).sum())
        count += len(rows)
    return {"cells": right / (4 * count), "psnr": -10 * math.log10(error / count)}
