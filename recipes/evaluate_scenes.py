"""Scores a base and an adapter side by side on scenes of held-out digits, each score with its 95 % interval.

    python recipes/evaluate_scenes.py --base model_cards/tiny-janus --adapter model_cards/tiny-janus-uc4x \\
        --scenes 500 --seed 1 --json scores.json --grid drawings.png

Needs: pip install -c constraints.txt -e ".[recipes]". About six minutes on two CPU cores.
Prints a markdown table: reading by kind of question, drawing by aspect, NLL (nats an image), reconstruction, tokens, seconds.
A classifier trained on the real scans (`digits.judge`) judges the drawings; it is no part of the model. Base and adapter draw
the same prompts in turn, batch by batch. The seconds are those of the drawings that are judged, end to end (language model,
decompressor, image decoder), after a warm-up batch each. docs/how-to/evaluate.md explains each score.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import transformers
from reporting.environment import check_output, environment
from reporting.intervals import mean
from scipy.stats import sem
from scoring.contenders import (
    Contender,
    check_adapters,
    check_sampling,
    contenders,
    drawn_steps,
    read_tokens,
    why_no_drawing,
)
from scoring.scene_scores import (
    SPLIT,
    DrawingScore,
    ReadingScore,
    feature_distance,
    render,
    score_drawing,
    score_nats,
    score_reading,
    score_reconstruction,
    with_other_scans,
)
from scoring.score_report import markdown, save_drawings
from timing.stopwatch import fitting_batch
from tiny_world.digits import Scene, check_scene_size, random_scene
from trl import TrlParser

from uc_adapters import CardFacts
from uc_adapters.families import family_of
from uc_adapters.hub.card import update_card


@dataclass
class EvaluateArguments:
    """What to score, and how."""

    base: str = field(default="model_cards/tiny-janus", metadata={"help": "The dense base: folder or Hub id."})
    adapter: str | None = field(default=None, metadata={"help": "The adapter: folder or Hub id. None: the base alone."})
    also: list[str] | None = field(
        default=None, metadata={"help": "More adapters, with a column of the table and a row of the grid each."}
    )
    codes_per_step: int | None = field(
        default=None, metadata={"help": "Codes in a step of --adapter, if it is trained for several."}
    )
    stride: int | None = field(default=None, metadata={"help": "Stride at which --adapter reads, likewise."})
    scenes: int = field(default=500, metadata={"help": "Held-out scenes to read, and prompts to draw. At least two."})
    seed: int = field(default=0, metadata={"help": "Seed of the scenes and of the sampling."})
    batch_size: int = field(default=25, metadata={"help": "Prompts drawn at once."})
    guidance_scale: float = field(default=2.0, metadata={"help": "Classifier-free guidance, base and adapter alike."})
    temperature: float = field(default=0.7, metadata={"help": "Sampling temperature, base and adapter alike."})
    json: str | None = field(default=None, metadata={"help": "File to write the scores to."})
    grid: str | None = field(default=None, metadata={"help": "PNG of the first prompts, as base and adapter drew them."})
    card: bool = field(default=False, metadata={"help": "Write the scores into the card of --adapter, which is a folder."})


def main(args: EvaluateArguments) -> dict:
    check(args)
    # Janus warns at every answer that max_new_tokens overrides max_length, which is only at its default (20)
    transformers.logging.set_verbosity_error()
    pair = contenders(args.base, args.adapter, codes_per_step=args.codes_per_step, stride=args.stride, also=args.also or ())
    check_scene_size(family_of(pair[0].model).geometry.image_size)
    reason = why_no_drawing(pair[0])
    if reason is not None:
        if args.grid:
            raise SystemExit(f"--grid {args.grid} shows drawings, and {args.base} cannot draw: {reason}. Leave --grid out.")
        print(f"Only reading is scored: {args.base} cannot draw, since {reason}.")
    rng = np.random.default_rng(args.seed)
    scenes = [random_scene(rng, SPLIT) for _ in range(args.scenes)]
    scores, drawn = fitting_batch(lambda: score_scenes(pair, scenes, args), args.batch_size)
    scores = {
        "dataset": f"digit scenes of held-out scans, n = {args.scenes}, seed {args.seed}",
        **scores,
        "settings": vars(args),
        "environment": environment(),
    }
    print(markdown(scores))
    if args.json:
        Path(args.json).write_text(json.dumps(scores, indent=2) + "\n")
    if args.grid:
        save_drawings(scenes, args.seed, drawn, Path(args.grid))
    if args.card:
        update_card(Path(args.adapter), CardFacts(evaluation=scores))
    return scores


def check(args: EvaluateArguments) -> None:
    """Exits on arguments that would fail after minutes, or give scores without meaning."""
    if args.scenes < 2:
        raise SystemExit(f"--scenes {args.scenes}: expected 2 or more, because a single scene has no interval.")
    if args.batch_size < 1:
        raise SystemExit(f"--batch_size {args.batch_size}: expected 1 or more.")
    check_sampling(args.temperature, args.guidance_scale, args.seed)
    if args.card and (args.adapter is None or not Path(args.adapter).is_dir()):
        raise SystemExit(f"--card writes into the folder of --adapter, and that is {args.adapter!r}; expected a folder.")
    for option, file in (("json", args.json), ("grid", args.grid)):
        check_output(option, file)
    if args.grid is not None and Path(args.grid).suffix != ".png":
        raise SystemExit(f"--grid {args.grid}: expected a file that ends in .png.")
    check_adapters(args.adapter, args.also or (), args.codes_per_step, args.stride)


def score_scenes(pair: list[Contender], scenes: list[Scene], args: EvaluateArguments) -> tuple[dict, dict[str, DrawingScore]]:
    """Scores every contender.

    Returns:
        The scores as `--json` writes them, each by contender; and the drawings by contender, empty if the base cannot draw.
    """
    reading = {contender.name: score_reading(contender, scenes, args.seed) for contender in pair}
    scores = {
        "reading": {name: score.estimates["mean"].value for name, score in reading.items()},
        "tokens": {"read": {contender.name: read_tokens(contender.processor) for contender in pair}},
        "reading_by_kind": _written(reading),
    }
    by_scene = {"reading": {name: score.by_scene for name, score in reading.items()}}
    drawn = {}
    if why_no_drawing(pair[0]) is None:
        sampling = {"do_sample": True, "temperature": args.temperature, "guidance_scale": args.guidance_scale}
        drawn = score_drawing(pair, scenes, args.seed, args.batch_size, **sampling)
        nats = {contender.name: score_nats(contender, scenes) for contender in pair}
        real = render(scenes)
        scores["tokens"]["drawn"] = {contender.name: drawn_steps(contender) for contender in pair}
        scores |= {
            "drawing": {name: score.estimates["quarters"].value for name, score in drawn.items()},
            "whole_scenes": {name: score.estimates["scenes"].value for name, score in drawn.items()},
            "nats_per_image": {name: float(values.mean()) for name, values in nats.items()},
            "feature_distance": {name: feature_distance(real, score.images) for name, score in drawn.items()},
            "seconds_per_image": {name: score.seconds for name, score in drawn.items()},
            "drawing_by_aspect": _written(drawn),
            "nats": {name: {**asdict(mean(values)), "standard_error": float(sem(values))} for name, values in nats.items()},
            "feature_distance_of_real": feature_distance(real, render(with_other_scans(scenes, args.seed))),
            "reconstruction": {contender.name: score_reconstruction(contender, scenes) for contender in pair},
        }
        by_scene |= {"drawing": {name: score.by_scene for name, score in drawn.items()}, "nats_per_image": nats}
    if "adapter" in reading:
        scores["differences"] = {what: asdict(mean(values["adapter"] - values["base"])) for what, values in by_scene.items()}
    return scores, drawn


def _written(scores: dict[str, ReadingScore] | dict[str, DrawingScore]) -> dict[str, dict[str, dict[str, float]]]:
    return {name: {what: asdict(x) for what, x in score.estimates.items()} for name, score in scores.items()}


if __name__ == "__main__":
    main(*TrlParser(EvaluateArguments).parse_args_and_config())
