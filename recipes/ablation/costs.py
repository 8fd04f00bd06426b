"""What a variant of `ablate.py` costs, whatever it has learned: the size of its weights, and the seconds of a drawing."""

from __future__ import annotations

import statistics
from collections import defaultdict

import numpy as np
from ablation.variants import Variant
from peft import get_peft_model_state_dict
from scoring.contenders import Contender, contenders, draw_in_turn, twin_of
from scoring.scene_scores import SPLIT, drawing_prompts
from tiny_world.digits import random_scene

from uc_adapters import UniCompressModel

TURNS = 5


def fresh(name: str, dense: Contender, variant: Variant) -> Contender:
    """The variant as it starts, on a bare base's weights."""
    model = variant.attach(twin_of(dense.model))
    variant.begin_stage_2(model)
    model.eval()
    return Contender(name, model, model.compact_processor(dense.processor))


def megabytes(model: UniCompressModel) -> float:
    """Of the weights that its repo would hold."""
    return sum(weight.nbytes for weight in get_peft_model_state_dict(model).values()) / 1e6


def costs(base: str, runs: dict[str, Variant], batch_size: int, sampling: dict) -> dict[str, dict[str, float]]:
    """The "megabytes" of the weights, and the "milliseconds" of a drawing, of the base and of each run, side by side.

    Drawing is timed end to end (language model, decompressor, image decoder), a batch by everyone in turn behind a warm-up
    each: the median of five turns.
    """
    (dense,) = contenders(base, None)
    everyone = [dense, *(fresh(name, dense, variant) for name, variant in runs.items())]
    rng = np.random.default_rng(0)
    captions = drawing_prompts([random_scene(rng, SPLIT) for _ in range(TURNS * batch_size)], 0)
    seconds = defaultdict(list)
    for _, one, images, taken in draw_in_turn(everyone, captions, 0, batch_size, **sampling):
        seconds[one.name].append(taken / len(images))
    return {
        one.name: {
            "megabytes": 0.0 if one is dense else megabytes(one.model),
            "milliseconds": 1000 * statistics.median(seconds[one.name]),
        }
        for one in everyone
    }
