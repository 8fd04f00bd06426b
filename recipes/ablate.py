"""Runs the paper's ablations on a tiny base: trains and scores every variant for each seed, and writes one table.

    python recipes/ablate.py --json docs/ablation.json
    python recipes/ablate.py --axes decompressor stride --seeds 1 2 3 --max_steps 900 --stage_1_steps 500

Needs: pip install -c constraints.txt -e ".[recipes]". Tested on CPU cores: a variant and seed takes five to ten minutes of one
core, all of them eight hours or more. An adapter that is on several axes is trained once a seed. Finished scores are kept in
`--output_dir`, and in `--json` for later runs. An interrupted run continues where it stopped, and two runs with different
`--seeds` can share a folder. All variants get the same short training, so their scores compare with each other, not with the
shipped adapter's. The cost of a drawing does not depend on training: all variants are timed side by side at the start of each
call, so let nothing else run then.
"""

from __future__ import annotations

import json
import shutil
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import transformers
from ablation.costs import costs
from ablation.variants import AXES, START, Variant
from finetuning.arguments import FinetuneArguments, TrainingConfig
from finetuning.base import load_base
from finetuning.data import make_collator, make_rows
from finetuning.stages import train_stage_1, train_stage_2
from reporting.environment import check_output, environment
from scoring.contenders import Contender, contenders
from scoring.scene_scores import SPLIT, score_drawing, score_nats, score_reading
from tiny_world.digits import random_scene
from tqdm.auto import tqdm
from transformers import AutoProcessor, set_seed
from trl import TrlParser

SCORES = {"reading": "reading", "quarters": "quarters drawn right", "scenes": "whole scenes", "nats": "NLL (nats an image)"}
COSTS = {"milliseconds": "ms a drawing", "megabytes": "MB of weights"}
SAMPLING = {"do_sample": True, "temperature": 0.7, "guidance_scale": 2.0}  # the defaults of evaluate_scenes.py
BATCH = 25  # prompts drawn at once, as in evaluate_scenes.py


@dataclass
class AblateArguments:
    """What to vary, and how long to train and score each variant."""

    base: str = field(default="model_cards/tiny-janus", metadata={"help": "The dense base: folder or Hub id."})
    axes: list[str] = field(
        default_factory=lambda: list(AXES), metadata={"help": f"Axes to vary, of {', '.join(AXES)}. Default: all."}
    )
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3], metadata={"help": "Seeds of weights, data, scenes, sampling."})
    stage_1_steps: int = field(default=250, metadata={"help": "Steps of stage 1."})
    max_steps: int = field(default=400, metadata={"help": "Steps of stage 2."})
    batch_size: int = field(default=16, metadata={"help": "Rows a step, in both stages."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of stage 2."})
    scenes: int = field(default=100, metadata={"help": "Held-out scenes to read, and prompts to draw, for each seed."})
    output_dir: str = field(default="work/ablation", metadata={"help": "Where the scores of finished variants are kept."})
    json: str | None = field(default=None, metadata={"help": "File to write all scores to."})

    @property
    def budget(self) -> dict:
        """The settings that two scores must share to be comparable."""
        names = ("base", "stage_1_steps", "max_steps", "batch_size", "learning_rate", "scenes")
        return {name: getattr(self, name) for name in names}


def run_of(variant: Variant) -> str:
    """The name of a variant's run: the first axis that has it, and its name there."""
    if variant is START:
        return "default"
    return next(f"{axis}, {name}" for axis, variants in AXES.items() for name, other in variants.items() if other is variant)


def runs_of(axes: list[str]) -> dict[str, Variant]:
    """Every variant of the axes, once each, keyed by the name of its run."""
    return {run_of(variant): variant for variant in [START, *(variant for axis in axes for variant in AXES[axis].values())]}


def train(variant: Variant, seed: int, args: AblateArguments, folder: Path) -> tuple[Contender, float | None]:
    """Trains a variant with the two stages of `finetune.py`.

    Returns:
        The trained adapter, and the perplexity of its least used global token (None without global codes).
    """
    options = FinetuneArguments(
        base=args.base, stage_1_steps=args.stage_1_steps, stage_1_batch_size=args.batch_size, **variant.options
    )
    training = TrainingConfig(
        output_dir=str(folder),
        seed=seed,
        max_steps=args.max_steps,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=args.batch_size,
        warmup_steps=0.1,  # a larger share than by default, since the run is short
        save_strategy="no",
        logging_steps=50,
    )
    set_seed(seed)
    model = variant.attach(load_base(options, training)).to(training.device)
    dense = AutoProcessor.from_pretrained(args.base)
    processor = model.compact_processor(dense)
    collator = make_collator(options, model, processor)
    images, rows, _ = make_rows(options, training, model, collator, dense)
    perplexity = train_stage_1(options, training, model, processor, images)
    variant.begin_stage_2(model)
    train_stage_2(options, training, model, collator, dense, rows)
    return Contender("adapter", model.eval(), processor), perplexity


def score(contender: Contender, seed: int, args: AblateArguments) -> dict[str, float | None]:
    """Scores reading, drawing and NLL on held-out scenes, the same ones for every variant."""
    rng = np.random.default_rng([seed, args.scenes])
    scenes = [random_scene(rng, SPLIT) for _ in range(args.scenes)]
    drawing = score_drawing([contender], scenes, seed, BATCH, **SAMPLING)[contender.name].estimates
    return {
        "reading": score_reading(contender, scenes, seed).estimates["mean"].value,
        "quarters": drawing["quarters"].value,
        "scenes": drawing["scenes"].value,
        "nats": float(score_nats(contender, scenes).mean()),
    }


def scores_of(name: str, variant: Variant | None, seed: int, args: AblateArguments) -> dict[str, float | None]:
    """The scores of a variant, or of the base if `variant` is None: from an earlier run, or by training now."""
    slug = "".join(letter if letter.isalnum() else "-" for letter in name)
    file = Path(args.output_dir, f"{slug}-seed-{seed}.json")
    if file.is_file():
        kept = json.loads(file.read_text())
        check_budget(file, kept["budget"], args)
        return kept["scores"]
    folder = file.with_suffix("")
    if variant is None:
        (contender,), perplexity = contenders(args.base, None), None
    else:
        contender, perplexity = train(variant, seed, args, folder)
    scores = score(contender, seed, args)
    scores["perplexity"] = perplexity
    # The package lacks the modules of some variants, so that their weights could not be loaded again.
    shutil.rmtree(folder, ignore_errors=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_suffix(".half")
    half.write_text(json.dumps({"budget": args.budget, "scores": scores}, indent=2) + "\n")
    half.replace(file)  # so the file is either whole or missing
    return scores


def check(args: AblateArguments) -> None:
    """Exits on arguments that would fail after hours, or give scores without meaning."""
    unknown = [axis for axis in args.axes if axis not in AXES]
    if unknown or not args.axes:
        raise SystemExit(f"--axes {unknown or '(none)'}: expected one or more of {', '.join(AXES)}.")
    if not args.seeds:
        raise SystemExit("--seeds (none): expected one or more.")
    if min(args.seeds) < 0:
        raise SystemExit(f"--seeds {min(args.seeds)}: expected 0 or more.")
    for option, least in (("stage_1_steps", 1), ("max_steps", 1), ("batch_size", 1), ("scenes", 2)):
        if getattr(args, option) < least:
            raise SystemExit(f"--{option} {getattr(args, option)}: expected {least} or more.")
    check_output("json", args.json)


def check_budget(file: Path, budget: dict | None, args: AblateArguments) -> None:
    """Exits if a file's scores have another budget, so that they do not compare, or if another recipe wrote the file."""
    if budget is None:
        raise SystemExit(f"{file} exists and holds no scores of ablate.py. Name another file, or remove this one.")
    if budget != args.budget:
        raise SystemExit(f"{file} was made with {budget}; expected {args.budget}. Name another file or folder, or remove it.")


def spread(values: list[float], score: str) -> str:
    """The mean over seeds, with the standard deviation if there are several, as text for a table."""
    scale, unit = (1, "") if score == "nats" else (100, " %")
    mean = f"{scale * statistics.mean(values):.1f}{unit}"
    return f"{mean} ± {scale * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def markdown(ablation: dict) -> str:
    """One markdown table, with the axes one after another."""
    titles = [*SCORES.values(), *COSTS.values()]
    lines = [f"| | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]

    def row(title: str, run: str) -> str:
        by_seed = ablation["runs"][run].values()
        figures = [spread([scores[score] for scores in by_seed], score) for score in SCORES]
        figures += [f"{ablation['costs'][run][cost]:.1f}" for cost in COSTS]
        return f"| {title} | {' | '.join(figures)} |"

    lines.append(row("the dense base", "base"))
    for axis in ablation["axes"]:
        lines.append(f"| **{axis}** |{' |' * len(titles)}")
        for name, variant in AXES[axis].items():
            lines.append(row(name, run_of(variant)))
    return "\n".join(lines)


def main(args: AblateArguments) -> dict:
    check(args)
    transformers.logging.set_verbosity_error()
    runs: dict[str, dict[str, dict[str, float | None]]] = {}
    if args.json and Path(args.json).is_file():
        written = json.loads(Path(args.json).read_text())
        check_budget(Path(args.json), written.get("budget") if isinstance(written, dict) else None, args)
        runs = written["runs"]  # the file also keeps the runs that this call does not ask for
    shown = {name: variant for name, variant in runs_of(list(AXES)).items() if name in {*runs, *runs_of(args.axes)}}
    run_costs = costs(args.base, shown, min(BATCH, args.scenes), SAMPLING)  # minutes, all that an interrupted run loses
    todo = [(str(seed), run) for seed in args.seeds for run in [("base", None), *runs_of(args.axes).items()]]
    for seed, (name, variant) in tqdm(todo, desc="variants"):  # seed by seed, so that a part of the time gives a whole table
        by_seed = runs.setdefault(name, {})
        by_seed[seed] = by_seed.get(seed) or scores_of(name, variant, int(seed), args)
    ablation = {
        "budget": args.budget,
        "axes": [axis for axis in AXES if all(name in runs for name in runs_of([axis]))],
        "runs": runs,
        "costs": run_costs,
        "environment": environment(),
    }
    print(markdown(ablation))
    if args.json:
        Path(args.json).write_text(json.dumps(ablation, indent=2) + "\n")
    return ablation


if __name__ == "__main__":
    main(*TrlParser(AblateArguments).parse_args_and_config())
