"""Stage 2: fine-tunes the language model with LoRA on compact sequences; the tokenizer side is frozen (UniCompress, section 3).

`finetune.py` runs it. The trainer extends TRL's `SFTTrainer`. The model returns it the scores of text tokens and image codes.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import datasets
from torch.utils.data import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from ..data import UniCompressCollator
from ..errors import InputError
from ..joint_loss import CODES, GLOBAL_CODE, TEXT, JointOutput
from ..model import UniCompressModel
from .resumable import ResumableTrainer

PARTS = {"loss_text": TEXT, "loss_global_codes": GLOBAL_CODE, "loss_codes": CODES}


class NamingCollator:
    """A collator that adds the names of the rows to a batch, under `origins`."""

    def __init__(self, collator: UniCompressCollator):
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return self.collator(rows) | {"origins": [row["origin"] for row in rows if "origin" in row]}


def with_occurrence(row: dict[str, Any], index: int, seed: int) -> dict[str, Any]:
    """Returns a row with the `occurrence` that has this place in the data."""
    return row | {"occurrence": f"{seed} {index}"}


class Occurrences(Dataset):
    """The rows of a dataset, each with its `occurrence`, since a mixture may repeat a row within an epoch.

    Args:
        rows: The rows.
        seed: Of the run, so that a run on the same rows with another seed drops other captions.
    """

    def __init__(self, rows: datasets.Dataset, seed: int):
        self.rows, self.seed = rows, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """The rows of a batch, which datasets reads and decodes at once."""
        rows = self.rows.__getitems__(indices)
        return [with_occurrence(row, index, self.seed) for row, index in zip(rows, indices, strict=True)]


class EpochCallback(TrainerCallback):
    """Sets the collator's epoch, so that other rows lose their captions in each epoch. A stream has only one."""

    def __init__(self, collator: UniCompressCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.epoch = int(state.epoch or 0)


class JointTrainer(ResumableTrainer, SFTTrainer):
    """Trains an adapter's language side to answer and to draw. Logs the losses of text, global codes and codes separately.

    Args:
        model: The base with an adapter.
        args: TRL's training arguments.
        data_collator: The adapter's collator.
        **kwargs: Passed to `SFTTrainer`.

    Raises:
        InputError: `args` is not an `SFTConfig`.
    """

    parts = tuple(PARTS)

    def __init__(self, model: UniCompressModel, args: SFTConfig, *, data_collator: UniCompressCollator, **kwargs: Any):
        if not isinstance(args, SFTConfig):
            raise InputError(
                f"args={type(args).__name__}; expected a trl.SFTConfig, since transformers' arguments lack TRL's own."
            )
        args = copy.copy(args)
        args.max_length, args.packing = None, False
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        # On a quantised base, TRL casts trainable weights to bfloat16, which rounds AdamW's steps on larger weights to zero.
        # So no weight is trainable until TRL is set up.
        model.requires_grad_(False)
        super().__init__(model, args, data_collator=NamingCollator(data_collator), **kwargs)
        self.eval_collator = NamingCollator(data_collator.without_chance())
        self.add_callback(EpochCallback(data_collator))
        self.model.train_only("language model")
        self.model.register_forward_hook(self._record_scores)  # SFTTrainer does not pass the model's output on

    def get_train_dataloader(self):
        """Returns a loader whose rows know their place in the data.

        A stream is read again from its start when it ends, and its rows are numbered on. So a resumed run finds its place.
        """
        rows, seed = self.train_dataset, self.args.seed
        if isinstance(rows, datasets.IterableDataset):
            self.train_dataset = rows.repeat(None).map(partial(with_occurrence, seed=seed), with_indices=True)
        else:
            self.train_dataset = Occurrences(rows, seed)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = rows

    def _get_train_sampler(self, train_dataset=None):
        """Returns a sampler of the rows themselves, since transformers looks for a column of their lengths."""
        return super()._get_train_sampler(train_dataset.rows if isinstance(train_dataset, Occurrences) else train_dataset)

    def get_eval_dataloader(self, eval_dataset=None):
        """Returns a loader for evaluation by labels alone, without caption dropout and without a teacher."""
        training, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs.pop("origins", None)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _record_scores(self, model, inputs, output) -> None:
        if isinstance(output, JointOutput):
            for part, kind in PARTS.items():
                of_kind = output.kinds == kind
                self.record(part, -output.log_probs[of_kind].sum(), of_kind.sum())

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes no card. TRL's card would name another library, and saving the adapter writes its own."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.model.train_only("language model")  # loading made all weights of the adapter trainable
