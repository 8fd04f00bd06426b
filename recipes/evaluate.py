"""Scores a base and an adapter side by side on scenes of held-out digits: reading, drawing, tokens, seconds, nats.

    python recipes/evaluate.py --base model_cards/tiny-janus --adapter model_cards/tiny-janus-uc4x \\
        --scenes 500 --seed 1 --json scores.json

Needs: pip install -c constraints.txt -e ".[recipes]". About six minutes on two CPU cores.
Drawings are judged by a classifier trained on the real scans (`digits.judge`), no part of the model. Base and adapter
draw the same prompts in turn, batch by batch; the seconds are those of the drawings that are judged, end to end
(language model, decompressor, image decoder), after a warm-up batch each.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from contenders import contenders, drawn_steps, read_tokens
from digits import random_scene
from likelihood import compact_nats, dense_nats
from scene_scores import SPLIT, score_drawing, score_reading, score_reconstruction
from tqdm.auto import tqdm
from trl import TrlParser

import uc_adapters
from uc_adapters import CardFacts
from uc_adapters.hub.card import update_card


@dataclass
class EvaluateArguments:
    """What to score, and how."""

    base: str = field(default="model_cards/tiny-janus", metadata={"help": "The dense base: folder or Hub id."})
    adapter: str | None = field(default=None, metadata={"help": "The adapter: folder or Hub id. None: the base alone."})
    scenes: int = field(default=500, metadata={"help": "Held-out scenes to read, and prompts to draw."})
    seed: int = field(default=0, metadata={"help": "Seed of the scenes and of the sampling."})
    batch_size: int = field(default=25, metadata={"help": "Prompts drawn at once."})
    guidance_scale: float = field(default=2.0, metadata={"help": "Classifier-free guidance, base and adapter alike."})
    temperature: float = field(default=0.7, metadata={"help": "Sampling temperature, base and adapter alike."})
    json: str | None = field(default=None, metadata={"help": "File to write the scores to."})
    card: bool = field(default=False, metadata={"help": "Write them into the card of --adapter, which is a folder."})


def main(args: EvaluateArguments) -> dict:
    # Janus warns at every answer that max_new_tokens wins over a max_length that nobody set (its default, 20)
    transformers.logging.set_verbosity_error()
    rng = np.random.default_rng(args.seed)
    scenes = [random_scene(rng, SPLIT) for _ in range(args.scenes)]
    pair = contenders(args.base, args.adapter)
    reading = {contender.name: score_reading(contender, scenes, args.seed) for contender in pair}
    sampling = {"do_sample": True, "temperature": args.temperature, "guidance_scale": args.guidance_scale}
    drawing = score_drawing(pair, scenes, args.seed, args.batch_size, **sampling)
    nats, tokens, reconstruction = {}, {}, {}
    for contender in pair:
        measure = dense_nats if contender.name == "base" else compact_nats
        total = 0.0
        for first in tqdm(range(0, len(scenes), 50), desc=f"{contender.name}: nats", leave=False):
            rows = scenes[first : first + 50]
            total += measure(contender, [scene.image(SPLIT) for scene in rows], [scene.caption() for scene in rows])
        nats[contender.name] = total / len(scenes)
        reconstruction[contender.name] = score_reconstruction(contender, scenes)
        tokens[contender.name] = read_tokens(contender.processor)
    drawn = {contender.name: drawn_steps(contender) for contender in pair}
    scores = {
        "dataset": f"digit scenes of held-out scans, n = {args.scenes}, seed {args.seed}",
        "reading": {name: score["mean"] for name, score in reading.items()},
        "drawing": {name: score["cells"] for name, score in drawing.items()},
        "tokens": {"read": tokens, "drawn": drawn},
        "seconds_per_image": {name: score["seconds"] for name, score in drawing.items()},
        "nats_per_image": nats,
        "whole_scenes": {name: score["scenes"] for name, score in drawing.items()},
        "reading_by_kind": reading,
        "reconstruction": reconstruction,
        "settings": vars(args),
        "environment": {
            "device": f"{torch.get_num_threads()} CPU threads, {platform.processor() or platform.machine()}",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "uc_adapters": uc_adapters.__version__,
        },
    }
    text = json.dumps(scores, indent=2)
    print(text)
    if args.json:
        Path(args.json).write_text(text + "\n")
    if args.card:
        update_card(Path(args.adapter), CardFacts(evaluation=scores))
    return scores


if __name__ == "__main__":
    main(*TrlParser(EvaluateArguments).parse_args_and_config())
