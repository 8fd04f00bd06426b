"""The costs of a variant of `ablate.py`, which do not depend on training: the size of its weights, the time of a drawing."""

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
    """An untrained adapter of the variant, on a bare base's weights."""
    model = variant.attach(twin_of(dense.model))
    variant.begin_stage_2(model)
    model.eval()
    return Contender(name, model, model.compact_processor(dense.processor))


def megabytes(model: UniCompressModel) -> float:
    """The size of the weights that the adapter's repo would hold, in MB."""
    return sum(weight.nbytes for weight in get_peft_model_state_dict(model).values()) / 1e6


def costs(base: str, runs: dict[str, Variant], batch_size: int, sampling: dict) -> dict[str, dict[str, float]]:
    """The "megabytes" of the weights and the "milliseconds" of a drawing, for the base and for each run.

    Drawing is timed end to end (language model, decompressor, image decoder). After a warm-up each, all draw a batch in turn;
    the figure is the median of five turns.
    """
    (dense,) = contenders(base, None)
    everyone = [dense, *(fresh(name, dense, variant) for name, variant in runs.items())]
    rng = np.random.default_rng(0)
    captions = drawing_prompts([random_scene(rng, SPLIT) for _ in range(TURNS * batch_size)], 0)
    seconds = defaultdict(list)
    for _, contender, images, taken in draw_in_turn(everyone, captions, 0, batch_size, **sampling):
        seconds[contender.name].append(taken / len(images))
    return {
        contender.name: {
            "megabytes": 0.0 if contender is dense else megabytes(contender.model),
            "milliseconds": 1000 * statistics.median(seconds[contender.name]),
        }
        for contender in everyone
    }
