"""Shared by the tests of finetune.py: what they run with, on what, and runs that are killed."""

import json
import os
import signal
from pathlib import Path

import finetune
from finetuning import stages
from helpers import rng
from tiny_world.digits import random_scene
from transformers import TrainerCallback

from uc_adapters.training import last_checkpoint

ARGUMENTS = {
    "stage_1_steps": 4,
    "stage_1_batch_size": 4,
    "decompressor_width": 64,
    "decompressor_layers": 1,
    "num_global_tokens": 1,
    "r": 2,
}
# Where a test looks at checkpoints; saving one takes as long as some steps
EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}
AT_END = {"save_strategy": "steps", "save_steps": 100}
TRAINING = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}


def train(base, output_dir, *, training: dict | None = None, **arguments) -> Path:
    """Runs finetune.py in this process."""
    finetune.main(
        finetune.FinetuneArguments(base=str(base), **{**ARGUMENTS, **arguments}),
        finetune.TrainingConfig(output_dir=str(output_dir), **{**TRAINING, **(training or {})}),
    )
    return Path(output_dir)


def log_of(folder: Path) -> list[dict]:
    """What the last checkpoint of a run has logged, line by line."""
    return json.loads((last_checkpoint(folder) / "trainer_state.json").read_text())["log_history"]


def write_captioned(folder: Path, count: int = 12) -> Path:
    """An imagefolder of scenes, with their captions as `text`."""
    folder.mkdir()
    lines = []
    for seed in range(count):
        scene = random_scene(rng(seed), "train")
        scene.image("train").save(folder / f"{seed}.png")
        lines.append(json.dumps({"file_name": f"{seed}.png", "text": scene.caption()}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def say(text: str | None) -> dict:
    """A part of a turn."""
    return {"type": "text", "text": text}


def turn(role: str, *parts: dict) -> dict:
    """A turn of a conversation."""
    return {"role": role, "content": list(parts)}


def write_rows(path: Path, rows: list[dict]) -> str:
    """Rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class KillAt(TrainerCallback):
    """SIGKILL before a step of one of the stages is over."""

    def __init__(self, step: int):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(stage: int, step: int, told: dict) -> None:
    """A run that does not live to its end."""
    victim = stages.ReconstructionTrainer if stage == 1 else stages.JointTrainer

    class Victim(victim):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(KillAt(step))

    setattr(stages, victim.__name__, Victim)
    train(**told)
