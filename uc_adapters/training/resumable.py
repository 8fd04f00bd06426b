"""The common part of both trainers: whole checkpoints, a stop if a loss is not finite, and parts of the loss in the log."""

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
    """Returns a copy of training arguments that passes whole rows to the collator, and its batches unchanged to the model."""
    args = copy.copy(args)
    args.remove_unused_columns = False
    args.accelerator_config = replace(args.accelerator_config, dispatch_batches=False)  # batches have unequal shapes
    args.ddp_find_unused_parameters = False  # every weight has a gradient in every batch
    return args


class TrainingError(RuntimeError):
    """Training cannot continue. The message names the step, the reason, the last good checkpoint, and the remedy."""


class ResumableTrainer:
    """A mixin for a transformers `Trainer`, to be listed before it. Batches may name their rows in `origins`."""

    parts: tuple[str, ...]
    """The parts of the loss that are logged separately. All processes log the same parts, whatever is in their batches."""

    def __init__(self, model: nn.Module, args: TrainingArguments, **kwargs):
        super().__init__(model, for_own_batches(args), **kwargs)
        # Sum and count of each part since the last log, for training and for evaluation
        self.sums = {prefix: {part: torch.zeros(2) for part in self.parts} for prefix in ("", "eval_")}

    def record(self, part: str, total: torch.Tensor, count: int | torch.Tensor = 1) -> None:
        """Adds a sum of `count` values to a part of the loss. The log has the mean over all processes."""
        sums = self.sums["" if self.model.training else "eval_"]
        sums[part] += torch.stack([total.detach().float().cpu(), torch.as_tensor(count).float().cpu()])

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.args.warmup_steps < 1 and self.args.get_warmup_steps(num_training_steps) >= num_training_steps:
            self.args.warmup_steps = 0  # transformers rounds a share up, here to the whole run
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, model, inputs, num_items_in_batch=None):
        origins = inputs.pop("origins", [])
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            rows = "; ".join(origins) or "not named by this dataset"
            raise TrainingError(
                f"The loss of step {self.state.global_step + 1} is {loss.item()}; expected a finite number. The rows of its "
                f"batch: {rows}. {self._kept()} Check the rows, lower --learning_rate, or train in float32."
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # An evaluation's loss has the name of its dataset, such as "eval_loss" or "eval_scenes_loss"
        loss = next((name for name in logs if name.startswith("eval_") and name.endswith("_loss")), None)
        prefix = "" if loss is None else loss.removesuffix("loss")
        for part, sums in self.sums["eval_" if prefix else ""].items():
            total, count = self.accelerator.reduce(sums.to(self.args.device), "sum").tolist()
            if count:
                logs[prefix + part] = total / count
            sums.zero_()
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
        except Exception as error:  # a full disk may raise OSError, RuntimeError or SafetensorError
            shutil.rmtree(folder, ignore_errors=True)
            raise TrainingError(
                f"The checkpoint of step {self.state.global_step} could not be written to {folder}: {error} Its "
                f"unfinished files are removed. {self._kept()} Free disk space, then continue with --resume true."
            ) from error

    def _kept(self) -> str:
        """Returns a sentence that names the last good checkpoint."""
        checkpoint = last_checkpoint(Path(self.args.output_dir))
        return f"The last good checkpoint is {checkpoint}." if checkpoint else "There is no checkpoint yet (see --save_steps)."


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the newest whole checkpoint in a folder, or None. A checkpoint is whole if its trainer state can be read.

    The trainer state is the file that is written last.
    """
    checkpoints = {int(path.name.rpartition("-")[2]): path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-[0-9]*")}
    for step in sorted(checkpoints, reverse=True):
        try:
            TrainerState.load_from_json(str(checkpoints[step] / TRAINER_STATE_NAME))
        except (OSError, ValueError):
            continue
        return checkpoints[step]
    return None
