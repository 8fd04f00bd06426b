"""The options of `finetune.py`. The defaults are for a tiny base on a CPU; `configs/` has settings for larger bases."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from transformers import SchedulerType
from trl import SFTConfig, TrlParser

from uc_adapters import UniCompressConfig

STEPS = 1350  # of stage 2, if neither steps nor epochs are given
NEW_ADAPTER = {  # the defaults of a new adapter; an existing one keeps its own settings
    "stride": 2,
    "num_global_tokens": 4,
    "decompressor": "strip",
    "codes_per_step": None,
    "drawing_global_tokens": False,
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

    If one of `max_steps` and `num_train_epochs` is given, it sets the length of the run. If both are, `max_steps` does.
    """

    output_dir: str | None = field(default="work/adapter", metadata={"help": "Folder of the adapter and its checkpoints."})
    max_steps: int | None = field(default=None, metadata={"help": f"Optimizer steps. None: {STEPS}, unless epochs are given."})
    num_train_epochs: float | None = field(default=None, metadata={"help": "Passes through the data, in place of steps."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Rows per batch and process."})
    learning_rate: float = field(default=4e-3, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: SchedulerType | str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up steps. Below 1: a share of the run."})
    weight_decay: float = 0.01
    bf16: bool | None = field(default=False, metadata={"help": "Train in bfloat16: 9 to 22 times slower on a CPU."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Take less memory and a third more time."})
    logging_steps: float = 20
    save_steps: float = field(default=300, metadata={"help": "Steps between checkpoints, and between evaluations."})
    report_to: str | None = field(default="none", metadata={"help": "Where to log: tensorboard, trackio, wandb, if installed."})

    def __post_init__(self):
        if self.max_steps is None:
            self.max_steps = STEPS if self.num_train_epochs is None else -1
        if self.num_train_epochs is None:
            self.num_train_epochs = 3.0  # SFTConfig's default; a positive max_steps overrides it
        if self.load_best_model_at_end and self.eval_strategy == "no":
            self.eval_strategy, self.eval_steps = self.save_strategy, self.save_steps
        self.metric_for_best_model = self.metric_for_best_model or "eval_loss"
        if self.greater_is_better is None:
            self.greater_is_better = "loss" not in self.metric_for_best_model
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # otherwise accelerate would let each process of torchrun train on its own
        super().__post_init__()


@dataclass
class FinetuneArguments:
    """What to train, and on which data; `TrainingConfig` says how. The defaults are for a tiny base."""

    base: str = field(default="model_cards/tiny-janus", metadata={"help": "The dense base: folder or Hub id."})
    base_id: str | None = field(default=None, metadata={"help": "Hub id of the base for the card, if --base is a folder."})
    dtype: str = field(default="auto", metadata={"help": "Dtype of the base: auto, float32, bfloat16, float16."})
    quantize: str | None = field(default=None, metadata={"help": "Load the language model in 8bit or 4bit."})
    adapter: str | None = field(default=None, metadata={"help": "Existing adapter to train in stage 2. None: a new one."})
    stage: int | None = field(default=None, metadata={"help": "Run stage 1 or 2 alone. None: 1, then 2."})
    resume: bool = field(default=False, metadata={"help": "Continue the run in OUTPUT_DIR."})
    dataset: list[str] | None = field(default=None, metadata={"help": "Hub ids, folders or files. None: digit scenes."})
    split: str = field(default="train", metadata={"help": "Split of the datasets."})
    columns: list[str] | None = field(default=None, metadata={"help": "The datasets' columns: text=caption image=photo."})
    dataset_weights: list[float] | None = field(default=None, metadata={"help": "Share of each dataset. None: every row once."})
    streaming: bool = field(default=False, metadata={"help": "Read rows while training. Needs --max_steps, caches nothing."})
    skip_bad_rows: bool = field(default=False, metadata={"help": "Leave bad rows out and name them, instead of stopping."})
    distill: bool = field(default=False, metadata={"help": "Learn from the dense base, too. It fills in missing answers."})
    caption_dropout: float = field(default=0.1, metadata={"help": "Share of drawing prompts to drop, for guidance."})
    eval_dataset: list[str] | None = field(default=None, metadata={"help": "Rows to evaluate on, given like --dataset."})
    eval_split: str | None = field(default=None, metadata={"help": "Split of --eval_dataset or --dataset. None: --split."})
    eval_share: float = field(default=0.0, metadata={"help": "Share of the rows to evaluate on and not to train on."})
    early_stopping: int = field(default=0, metadata={"help": "Stop after N evaluations without a better one. 0: never."})
    sample_steps: int = field(default=0, metadata={"help": "Steps between sample pictures. 0: none."})
    stage_1_steps: int = field(default=500, metadata={"help": "Optimizer steps of stage 1."})
    stage_1_batch_size: int = field(default=32, metadata={"help": "Images per batch and process; no accumulation."})
    stage_1_learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of stage 1."})
    stride: list[int] | None = field(default=None, metadata={"help": "Side of the windows that become one token; or several."})
    num_global_tokens: int | None = field(default=None, metadata={"help": "Global tokens of an image (learned queries)."})
    decompressor: str | None = field(default=None, metadata={"help": "Turns compact tokens into codes: strip, phase, raster."})
    codes_per_step: list[int] | None = field(default=None, metadata={"help": "Codes in a step; several: to choose among."})
    drawing_global_tokens: bool | None = field(default=None, metadata={"help": "Global tokens before a drawing, too."})
    decompressor_layers: int | None = field(default=None, metadata={"help": "Layers of the decompressor."})
    decompressor_width: int | None = field(default=None, metadata={"help": "Width of the decompressor."})
    codebook_weight: float | None = field(default=None, metadata={"help": "Weight of the codes in the loss of stage 1."})
    r: int | None = field(default=None, metadata={"help": "LoRA rank."})
    lora_alpha: int | None = field(default=None, metadata={"help": "LoRA alpha."})
    target_modules: list[str] | None = field(default=None, metadata={"help": "Layers with a LoRA. None: all linear ones."})

    @property
    def settings(self) -> dict:
        """The settings that decide the outcome; a resumed run must have the same ones."""
        named = {name: value for name, value in vars(self).items() if name not in UNDECISIVE}
        return named | (self.of_adapter if self.adapter is None else {})

    @property
    def of_adapter(self) -> dict:
        """The fields of a new adapter's config."""
        named = {name: getattr(self, name) for name in NEW_ADAPTER}
        return {name: NEW_ADAPTER[name] if value is None else value for name, value in named.items()}

    def config(self) -> UniCompressConfig:
        """The config of a new adapter."""
        return UniCompressConfig(**self.of_adapter)

    def differences(self, config: UniCompressConfig) -> list[str]:
        """The settings that these options name and an existing adapter's config does not have, one text each."""
        named = {name: getattr(self, name) for name in NEW_ADAPTER if getattr(self, name) is not None}
        asked = {name: getattr(replace(config, **{name: value}), name) for name, value in named.items()}  # in the config's form
        has = {name: getattr(config, name) for name in asked}
        return [f"{name}: it has {has[name]!r}, asked for {asked[name]!r}" for name in asked if asked[name] != has[name]]


UNDECISIVE = ("resume", "stage", "sample_steps", "base_id", "early_stopping")
GROUPS = {
    "The base, and where to begin": ("base", "base_id", "dtype", "quantize", "adapter", "stage", "resume", "output_dir"),
    "Data": ("dataset", "split", "columns", "dataset_weights", "streaming", "skip_bad_rows", "distill", "caption_dropout"),
    "Stage 1, the tokenizer side": ("stage_1_steps", "stage_1_batch_size", "stage_1_learning_rate"),
    "Stage 2, the language side": (
        *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"),
        *("lr_scheduler_type", "warmup_steps", "weight_decay", "bf16", "gradient_checkpointing", "seed"),
    ),
    "Evaluation and logging": (
        *("eval_dataset", "eval_split", "eval_share", "early_stopping", "load_best_model_at_end", "sample_steps"),
        *("logging_steps", "save_steps", "report_to"),
    ),
    "A new adapter": tuple(NEW_ADAPTER),
    "Sharing": ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_token"),
}
HELP = {  # shorter texts for SFTConfig's own options
    "gradient_accumulation_steps": "Batches per optimizer step.",
    "weight_decay": "Weight decay of AdamW.",
    "seed": "Seed of everything random.",
    "load_best_model_at_end": "End with the checkpoint that evaluates best.",
    "logging_steps": "Steps between lines of the log.",
    "push_to_hub": "Push the finished adapter, with its card.",
    "hub_model_id": "Repo to push to: org/name.",
    "hub_private_repo": "Make a private repo.",
    "hub_token": "Token for the Hub. Default: the one of your login.",
}


class FinetuneParser(TrlParser):
    """Parses the command line and --config FILE.yaml. The help shows the options that matter to this recipe."""

    def __init__(self):
        super().__init__((FinetuneArguments, TrainingConfig))

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs) -> tuple[FinetuneArguments, TrainingConfig]:
        args = list(sys.argv[1:] if args is None else args)
        named = {arg.partition("=")[0] for arg in args}
        if {"--max_steps", "--num_train_epochs"} <= named:
            self.error("--max_steps with --num_train_epochs; expected one of them.")
        if "--num_train_epochs" in named:  # overrides max_steps of a config file
            args += ["--max_steps", "-1"]
        return super().parse_args_and_config(args, **kwargs)

    def set_defaults_with_config(self, **kwargs) -> list[str]:
        if (kwargs.get("max_steps") or -1) > 0 and kwargs.get("num_train_epochs") is not None:
            self.error(f"The config file has max_steps {kwargs['max_steps']} and num_train_epochs; expected one of them.")
        return super().set_defaults_with_config(**kwargs)

    def format_help(self) -> str:
        actions = {action.dest: action for action in self._actions}
        lines = ["usage: finetune.py [--config FILE.yaml] [--OPTION VALUE ...]", ""]
        for title, names in GROUPS.items():
            lines.append(f"{title}:")
            for name in names:
                default = NEW_ADAPTER.get(name, actions[name].default)
                text = HELP.get(name) or actions[name].help
                default = "" if default is None else f" [{getattr(default, 'value', default)}]"
                lines.append(f"  --{name:28}{text}{default}")
        lines += textwrap.wrap(
            "In brackets: the default, or the value from --config. All other options of trl.SFTConfig work, too, except "
            "for text preparation: https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig. More: docs/how-to/train.md.",
            110,
        )
        return "\n".join(lines) + "\n"
