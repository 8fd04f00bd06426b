"""What the trainers of both stages share: whole checkpoints, a stop where a loss is no number, parts of the loss in the log."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer import PREFIX_CHECKPOINT_DIR, TRAINER_STATE_NAME


def for_own_batches(args: TrainingArguments) -> TrainingArguments:
    """A copy of a trainer's arguments with which rows reach the collator whole, and its batches reach the model."""
    args = copy.copy(args)
    args.remove_unused_columns = False
    args.accelerator_config = replace(args.accelerator_config, dispatch_batches=False)  # batches have unequal shapes
    args.ddp_find_unused_parameters = False  # every weight gets its gradient in every batch, whatever that holds
    return args


class TrainingError(RuntimeError):
    """Training cannot go on; says at which step and why, what is kept, and what to do."""


class ResumableTrainer:
    """To be put in front of a transformers `Trainer`; batches may name their rows in `origins`."""

    parts: tuple[str, ...]
    """Of the loss, to be logged apart. All processes log the same ones, whatever their batches hold."""

    def __init__(self, model: nn.Module, args: TrainingArguments, **kwargs):
        super().__init__(model, for_own_batches(args), **kwargs)
        # Total and count since the last log, in training and in evaluation
        self.sums = {prefix: {part: torch.zeros(2) for part in self.parts} for prefix in ("", "eval_")}

    def record(self, part: str, total: torch.Tensor, count: int | torch.Tensor = 1) -> None:
        """Adds to a part of the loss, whose mean over all processes is logged."""
        sums = self.sums["" if self.model.training else "eval_"]
        sums[part] += torch.stack([total.detach().float().cpu(), torch.as_tensor(count).float().cpu()])

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.args.warmup_steps < 1 and self.args.get_warmup_steps(num_training_steps) >= num_training_steps:
            self.args.warmup_steps = 0  # a share, rounded up to the whole of a short run
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, model, inputs, num_items_in_batch=None):
        origins = inputs.pop("origins", [])
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            rows = "; ".join(origins) or "not named by this dataset"
            raise TrainingError(
                f"The loss of step {self.state.global_step + 1} is {loss.item()}. The rows of its batch: {rows}. "
                f"{self._kept()} Look at the rows, lower --learning_rate, or train in float32."
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        prefix = "eval_" if any(name.startswith("eval_") for name in logs) else ""
        for part, of_process in self.sums[prefix].items():
            total, count = self.accelerator.reduce(of_process.to(self.args.device), "sum").tolist()
            if count:
                logs[prefix + part] = total / count
            of_process.zero_()
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        bad = [name for name, weight in model.named_parameters() if weight.requires_grad and not weight.isfinite().all()]
        if bad:
            raise TrainingError(
                f"After step {self.state.global_step}, {len(bad)} weight(s) are not finite ({bad[0]}, ...), so they are not "
                f"saved. {self._kept()} Lower --learning_rate, or train in float32."
            )
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:  # a full disk is an OSError, a RuntimeError or a SafetensorError, by who notices
            shutil.rmtree(folder, ignore_errors=True)
            raise TrainingError(
                f"The checkpoint of step {self.state.global_step} could not be written to {folder}: {error} What there is of "
                f"it is removed. {self._kept()} Make room, then go on with --resume true."
            ) from error

    def _kept(self) -> str:
        checkpoint = last_checkpoint(Path(self.args.output_dir))
        return f"The last good checkpoint is {checkpoint}." if checkpoint else "There is no checkpoint yet (--save_steps)."


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole: its trainer's state is written last."""
    checkpoints = {int(path.name.rpartition("-")[2]): path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-[0-9]*")}
    for step in sorted(checkpoints, reverse=True):
        try:
            TrainerState.load_from_json(str(checkpoints[step] / TRAINER_STATE_NAME))
        except (OSError, ValueError):
            continue
        return checkpoints[step]
    return None
