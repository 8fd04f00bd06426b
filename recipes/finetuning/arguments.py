"""What `finetune.py` can be told; the defaults are for a tiny base on a CPU, `configs/` has those of larger bases."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from transformers import SchedulerType
from trl import SFTConfig, TrlParser

from uc_adapters import UniCompressConfig

STEPS = 1350  # of the language side, where neither steps nor epochs are named
NEW_ADAPTER = {  # where nothing else is named; an adapter that exists has its own
    "stride": 2,
    "num_global_tokens": 4,
    "decompressor": "strip",
    "decompressor_layers": 2,
    "decompressor_width": 192,
    "codebook_weight": 1.0,
    "r": 64,
    "lora_alpha": 64,
    "target_modules": None,
}


@dataclass
class TrainingConfig(SFTConfig):
    """`SFTConfig` with other defaults.

    Of `max_steps` and `num_train_epochs`, the one that is named counts; a number of steps counts before epochs.
    """

    output_dir: str | None = field(default="work/adapter", metadata={"help": "Where the adapter goes, and its checkpoints."})
    max_steps: int | None = field(default=None, metadata={"help": f"Optimizer steps. None: {STEPS}, unless epochs are named."})
    num_train_epochs: float | None = field(default=None, metadata={"help": "Passes through the data, in place of steps."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Rows a step and process."})
    learning_rate: float = field(default=4e-3, metadata={"help": "Its peak."})
    lr_scheduler_type: SchedulerType | str = field(default="cosine", metadata={"help": "How it falls."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Steps of warm-up; below 1 a share of the run."})
    weight_decay: float = 0.01
    bf16: bool | None = field(default=False, metadata={"help": "Train in bfloat16. On a CPU 9 to 22 times slower."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Less memory, for a third more time."})
    logging_steps: float = 20
    save_steps: float = field(default=300, metadata={"help": "Steps between checkpoints, and between evaluations."})
    report_to: str | None = field(default="none", metadata={"help": "tensorboard, trackio, wandb: what is installed."})

    def __post_init__(self):
        if self.max_steps is None:
            self.max_steps = STEPS if self.num_train_epochs is None else -1
        if self.num_train_epochs is None:
            self.num_train_epochs = 3.0  # SFTConfig's; max_steps goes before
        if self.load_best_model_at_end and self.eval_strategy == "no":
            self.eval_strategy, self.eval_steps = self.save_strategy, self.save_steps
        self.metric_for_best_model = self.metric_for_best_model or "eval_loss"
        if self.greater_is_better is None:
            self.greater_is_better = "loss" not in self.metric_for_best_model
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # else accelerate would have each process of torchrun train alone
        super().__post_init__()


@dataclass
class FinetuneArguments:
    """What to train, and on what; how is TrainingConfig's. The defaults are for a tiny base."""

    base: str = field(default="model_cards/tiny-janus", metadata={"help": "The dense base: folder or Hub id."})
    base_id: str | None = field(default=None, metadata={"help": "The base's Hub id, where --base is a folder: for the card."})
    dtype: str = field(default="auto", metadata={"help": "In which the base is loaded: auto, float32, bfloat16, float16."})
    quantize: str | None = field(default=None, metadata={"help": "Hold the language model in 8bit or 4bit."})
    adapter: str | None = field(default=None, metadata={"help": "Train this adapter's stage 2 on. None: a new adapter."})
    stage: int | None = field(default=None, metadata={"help": "1 or 2 alone. None: 1, then 2."})
    resume: bool = field(default=False, metadata={"help": "Go on with the run in OUTPUT_DIR."})
    dataset: list[str] | None = field(default=None, metadata={"help": "Hub ids, folders or files. None: digit scenes."})
    split: str = field(default="train", metadata={"help": "Which split of them."})
    columns: list[str] | None = field(default=None, metadata={"help": "Names of their columns: text=caption image=photo."})
    dataset_weights: list[float] | None = field(default=None, metadata={"help": "Shares in the mixture. None: every row once."})
    streaming: bool = field(default=False, metadata={"help": "Read while training. Needs --max_steps; nothing is cached."})
    skip_bad_rows: bool = field(default=False, metadata={"help": "Leave bad rows out and say so, instead of stopping."})
    distill: bool = field(default=False, metadata={"help": "The dense base teaches: labels, and rows that lack an answer."})
    caption_dropout: float = field(default=0.1, metadata={"help": "Share of drawing prompts dropped, for guidance."})
    eval_dataset: list[str] | None = field(default=None, metadata={"help": "Rows to evaluate on, named as --dataset."})
    eval_split: str | None = field(default=None, metadata={"help": "Their split, or that of --dataset. None: --split."})
    eval_share: float = field(default=0.0, metadata={"help": "In place of these: a share of the rows, kept from training."})
    early_stopping: int = field(default=0, metadata={"help": "Stop after so many evaluations without a better one. 0: never."})
    sample_steps: int = field(default=0, metadata={"help": "Write sample pictures every so many steps. 0: none."})
    stage_1_steps: int = field(default=500, metadata={"help": "Optimizer steps of stage 1."})
    stage_1_batch_size: int = field(default=32, metadata={"help": "Images a step and process; never accumulated."})
    stage_1_learning_rate: float = field(default=1e-3, metadata={"help": "Its peak in stage 1."})
    stride: int | None = field(default=None, metadata={"help": "Side of the windows that become one token."})
    num_global_tokens: int | None = field(default=None, metadata={"help": "Learned queries of an image."})
    decompressor: str | None = field(default=None, metadata={"help": "How drawings become dense again: strip, phase, raster."})
    decompressor_layers: int | None = field(default=None, metadata={"help": "Its depth."})
    decompressor_width: int | None = field(default=None, metadata={"help": "Its width."})
    codebook_weight: float | None = field(default=None, metadata={"help": "Weight of the codes in stage 1's loss."})
    r: int | None = field(default=None, metadata={"help": "LoRA rank."})
    lora_alpha: int | None = field(default=None, metadata={"help": "LoRA alpha."})
    target_modules: list[str] | None = field(default=None, metadata={"help": "Layers with a LoRA. None: every linear one."})

    @property
    def settings(self) -> dict:
        """What decides the outcome: compared when a run is resumed."""
        named = {name: value for name, value in vars(self).items() if name not in UNDECISIVE}
        return named | (self.of_adapter if self.adapter is None else {})

    @property
    def of_adapter(self) -> dict:
        """The fields of a new adapter's config."""
        named = {name: getattr(self, name) for name in NEW_ADAPTER}
        return {name: NEW_ADAPTER[name] if value is None else value for name, value in named.items()}

    def config(self) -> UniCompressConfig:
        """Of a new adapter."""
        return UniCompressConfig(**self.of_adapter)

    def differences(self, config: UniCompressConfig) -> list[str]:
        """What is asked for and an adapter that exists does not have."""
        asked = {name: getattr(self, name) for name in NEW_ADAPTER if getattr(self, name) is not None}
        asked = {name: set(value) if isinstance(value, list) else value for name, value in asked.items()}
        there = {name: getattr(config, name) for name in asked}
        return [f"{name}: {there[name]!r} there, {asked[name]!r} asked for" for name in asked if asked[name] != there[name]]


UNDECISIVE = ("resume", "stage", "sample_steps", "base_id", "early_stopping")
GROUPS = {
    "The base, and where to begin": ("base", "base_id", "dtype", "quantize", "adapter", "stage", "resume", "output_dir"),
    "Data": ("dataset", "split", "columns", "dataset_weights", "streaming", "skip_bad_rows", "distill", "caption_dropout"),
    "Stage 1, the tokenizer side": ("stage_1_steps", "stage_1_batch_size", "stage_1_learning_rate"),
    "Stage 2, the language side": (
        *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"),
        *("lr_scheduler_type", "warmup_steps", "weight_decay", "bf16", "gradient_checkpointing", "seed"),
    ),
    "Watching": (
        *("eval_dataset", "eval_split", "eval_share", "early_stopping", "load_best_model_at_end", "sample_steps"),
        *("logging_steps", "save_steps", "report_to"),
    ),
    "A new adapter": tuple(NEW_ADAPTER),
    "Sharing": ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_token"),
}
HELP = {  # of SFTConfig's own options, in fewer words
    "gradient_accumulation_steps": "Batches of one optimizer step.",
    "weight_decay": "Of AdamW.",
    "seed": "Of everything random.",
    "load_best_model_at_end": "End with the checkpoint that evaluates best.",
    "logging_steps": "Steps between lines of the log.",
    "push_to_hub": "Push the finished adapter, with its card.",
    "hub_model_id": "To where: org/name.",
    "hub_private_repo": "Make a private repo.",
    "hub_token": "Default: the one logged in with.",
}


class FinetuneParser(TrlParser):
    """Arguments of the command line and of --config FILE.yaml, with a help that shows this recipe's own."""

    def __init__(self):
        super().__init__((FinetuneArguments, TrainingConfig))

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs) -> tuple[FinetuneArguments, TrainingConfig]:
        args = list(sys.argv[1:] if args is None else args)
        named = {arg.partition("=")[0] for arg in args}
        if {"--max_steps", "--num_train_epochs"} <= named:
            self.error("--max_steps and --num_train_epochs: expected one of them.")
        if "--num_train_epochs" in named:  # goes before the steps of a config file
            args += ["--max_steps", "-1"]
        return super().parse_args_and_config(args, **kwargs)

    def set_defaults_with_config(self, **kwargs) -> list[str]:
        if (kwargs.get("max_steps") or -1) > 0 and kwargs.get("num_train_epochs") is not None:
            self.error(f"The config has max_steps {kwargs['max_steps']} and num_train_epochs; expected one of them.")
        return super().set_defaults_with_config(**kwargs)

    def format_help(self) -> str:
        actions = {action.dest: action for action in self._actions}
        lines = ["usage: finetune.py [--config FILE.yaml] [--OPTION VALUE ...]", ""]
        for title, names in GROUPS.items():
            lines.append(f"{title}:")
            for name in names:
                default = NEW_ADAPTER.get(name, actions[name].default)
                told = HELP.get(name) or actions[name].help
                default = "" if default is None else f" [{getattr(default, 'value', default)}]"
                lines.append(f"  --{name:28}{told}{default}")
        lines += textwrap.wrap(
            "In brackets: the default, or what --config names. Every other option of trl.SFTConfig works, too, but for those "
            "about preparing text: https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig. More: docs/how-to/train.md.",
            110,
        )
        return "\n".join(lines) + "\n"
