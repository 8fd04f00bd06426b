"""What `finetune.py` can be told; the defaults are for a tiny base on a CPU, `configs/` has those of larger bases."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import SchedulerType
from trl import SFTConfig

from uc_adapters import UniCompressConfig


@dataclass
class TrainingConfig(SFTConfig):
    """`SFTConfig` with other defaults.

    `max_steps` goes before `num_train_epochs`: --max_steps -1 --num_train_epochs 1 goes through the data once.
    """

    output_dir: str | None = "work/adapter"
    max_steps: int = 1350
    per_device_train_batch_size: int = 32
    learning_rate: float = 4e-3
    lr_scheduler_type: SchedulerType | str = "cosine"
    warmup_steps: float = 40
    weight_decay: float = 0.01
    bf16: bool | None = False  # 9 to 22 times slower than float32 on a CPU
    gradient_checkpointing: bool = False
    logging_steps: float = 20
    save_steps: float = 300
    report_to: str | None = "none"


@dataclass
class FinetuneArguments:
    """What to train, and on what; how is TrainingConfig's. The defaults are for a tiny base."""

    base: str = field(default="model_cards/tiny-janus", metadata={"help": "The dense base: folder or Hub id."})
    base_id: str | None = field(default=None, metadata={"help": "The base's Hub id, where --base is a folder: for the card."})
    dtype: str = field(default="auto", metadata={"help": "In which the base is loaded: auto, float32, bfloat16."})
    quantize: str | None = field(default=None, metadata={"help": "Hold the language model in 8bit or 4bit."})
    stage: int | None = field(default=None, metadata={"help": "1 or 2. None: 1, then 2."})
    adapter: str | None = field(default=None, metadata={"help": "Where stage 2 begins. None: OUTPUT_DIR/stage1."})
    resume: bool = field(default=False, metadata={"help": "Go on with the run in OUTPUT_DIR."})
    dataset: list[str] | None = field(default=None, metadata={"help": "Hub ids, folders or files. None: digit scenes."})
    dataset_weights: list[float] | None = field(default=None, metadata={"help": "Shares in the mixture. None: every row once."})
    streaming: bool = field(default=False, metadata={"help": "Read while training. Needs --max_steps; nothing is cached."})
    skip_bad_rows: bool = field(default=False, metadata={"help": "Leave bad rows out and say so, instead of stopping."})
    distill: bool = field(
        default=False,
        metadata={"help": "Learn from the dense base: words, codes of `strip`, and what it says to rows that lack an answer."},
    )
    caption_dropout: float = field(default=0.1, metadata={"help": "Share of drawing prompts dropped, for guidance."})
    sample_steps: int = field(default=0, metadata={"help": "Write sample pictures every so many steps. 0: none."})
    stage_1_steps: int = field(default=500, metadata={"help": "Optimizer steps of stage 1."})
    stage_1_batch_size: int = field(default=32, metadata={"help": "Images a step and process; never accumulated."})
    stage_1_learning_rate: float = field(default=1e-3, metadata={"help": "Peak of stage 1."})
    stride: int = field(default=2, metadata={"help": "See UniCompressConfig."})
    num_global_tokens: int = field(default=4, metadata={"help": "See UniCompressConfig."})
    decompressor: str = field(default="strip", metadata={"help": "See UniCompressConfig."})
    decompressor_layers: int = field(default=2, metadata={"help": "See UniCompressConfig."})
    decompressor_width: int = field(default=192, metadata={"help": "See UniCompressConfig."})
    codebook_weight: float = field(default=1.0, metadata={"help": "See UniCompressConfig."})
    r: int = field(default=64, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=64, metadata={"help": "LoRA alpha."})
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers of the language model with a LoRA. None: every linear one."}
    )

    @property
    def settings(self) -> dict:
        """What decides the outcome: compared when a run is resumed."""
        return {name: value for name, value in vars(self).items() if name not in ("resume", "stage", "sample_steps", "base_id")}

    def config(self) -> UniCompressConfig:
        """Of a new adapter."""
        names = ("stride", "num_global_tokens", "decompressor", "decompressor_layers", "decompressor_width", "codebook_weight")
        return UniCompressConfig(**{name: getattr(self, name) for name in (*names, "r", "lora_alpha", "target_modules")})
