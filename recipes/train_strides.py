"""Trains and scores an adapter of a tiny base that reads, at one stride or at several to choose among.

    python recipes/train_strides.py --stride 4 --output_dir work/strides/4
    python recipes/train_strides.py --stride 1 2 4 --output_dir work/strides/dial

Needs: pip install -c constraints.txt -e ".[recipes]". Tested on CPU cores: an adapter takes 20 to 40 minutes of a core.

These are the two stages of `finetune.py --distill` on scenes that are only read; `train_ratios.py` only draws.
The adapter answers held-out questions at each of its strides. OUTPUT_DIR/scores.json has the shares of right answers.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import transformers
from finetuning.arguments import STEPS, FinetuneArguments, TrainingConfig
from finetuning.base import load_base
from finetuning.data import SCENES, make_collator
from finetuning.stages import train_stage_1, train_stage_2
from reporting.environment import environment
from scoring.contenders import Contender, load_processor, read_tokens
from scoring.scene_scores import SPLIT, score_reading
from tiny_world.digits import random_scene
from tiny_world.scenes_dataset import scenes_dataset
from transformers import set_seed
from trl import TrlParser

from uc_adapters import get_uc_model


@dataclass
class StrideArguments:
    """What to train, and for how long. The defaults are those of finetune.py."""

    base: str = field(default="model_cards/tiny-janus", metadata={"help": "The dense base: folder or Hub id."})
    stride: list[int] = field(default_factory=lambda: [2], metadata={"help": "Side of the windows; several: a dial."})
    stage_1_steps: int = field(default=500, metadata={"help": "Steps of stage 1."})
    max_steps: int = field(default=STEPS, metadata={"help": "Steps of stage 2."})
    batch_size: int = field(default=32, metadata={"help": "Scenes in a step, of both stages."})
    learning_rate: float = field(default=4e-3, metadata={"help": "Peak learning rate of stage 2."})
    seed: int = field(default=0, metadata={"help": "Seed of weights and data."})
    output_dir: str = field(default="work/strides/2", metadata={"help": "Folder of the adapter and its scores."})
    scenes: int = field(default=500, metadata={"help": "Held-out scenes to ask about."})
    scenes_seed: int = field(default=1, metadata={"help": "Seed of the held-out scenes and of the questions."})


def train(args: StrideArguments) -> Contender:
    """Trains an adapter, and saves it in OUTPUT_DIR."""
    options = FinetuneArguments(
        base=args.base, stride=args.stride, distill=True, stage_1_steps=args.stage_1_steps, stage_1_batch_size=args.batch_size
    )
    training = TrainingConfig(
        output_dir=args.output_dir,
        seed=args.seed,
        max_steps=args.max_steps,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=args.batch_size,
        save_strategy="no",
        logging_steps=50,
    )
    set_seed(args.seed)
    model = get_uc_model(load_base(options, training), options.config()).to(training.device)
    dense = load_processor(args.base)
    processor = model.compact_processor(dense)
    collator = make_collator(options, model, processor)
    train_stage_1(options, training, model, processor, scenes_dataset(SCENES, args.seed, draws=False))
    rows = scenes_dataset(args.max_steps * args.batch_size, args.seed + 1, draws=False)
    train_stage_2(options, training, model, collator, dense, rows)
    model.eval().save_pretrained(args.output_dir, processor=processor)
    return Contender("adapter", model, processor)


def score(adapter: Contender, stride: int, args: StrideArguments) -> dict:
    """Asks the adapter about held-out scenes, read at one of its strides."""
    rng = np.random.default_rng(args.scenes_seed)
    scenes = [random_scene(rng, SPLIT) for _ in range(args.scenes)]
    at = Contender(f"stride {stride}", adapter.model, adapter.model.compact_processor(adapter.processor, stride))
    estimates = score_reading(at, scenes, args.scenes_seed).estimates
    return {"tokens": read_tokens(at.processor), **{kind: asdict(estimate) for kind, estimate in estimates.items()}}


def markdown(result: dict) -> str:
    """A row for each stride of OUTPUT_DIR/scores.json, with 95 % intervals."""
    lines = ["| | tokens an image | answers right |", "|---|---|---|"]
    for stride, at in result["scores"].items():
        value, low, high = (100 * at["mean"][key] for key in ("value", "low", "high"))
        lines.append(f"| stride {stride} | {at['tokens']} | {value:.1f} % ({low:.1f} to {high:.1f}) |")
    return "\n".join(lines)


def main(args: StrideArguments) -> dict:
    transformers.logging.set_verbosity_error()  # Janus warns at every answer of a max_length that nobody set
    adapter = train(args)
    result = {
        "settings": asdict(args),
        "environment": environment(),
        "scores": {str(stride): score(adapter, stride, args) for stride in adapter.model.active_peft_config.strides},
    }
    Path(args.output_dir, "scores.json").write_text(json.dumps(result, indent=2) + "\n")
    print(markdown(result))
    return result


if __name__ == "__main__":
    main(*TrlParser(StrideArguments).parse_args_and_config())
