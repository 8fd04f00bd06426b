"""Stage 2: fine-tunes an adapter on reading and drawing with the stock `trl.SFTTrainer`, tokenizer side frozen.

    python recipes/finetune.py --base model_cards/tiny-janus --adapter work/stage1 --output_dir work/stage2

Needs: pip install -c constraints.txt -e ".[recipes]". Tested on two CPU cores.

Rows are TRL's conversational vision format, {"messages": [...], "images": [...]}: an image in a user turn is read, an
image in an assistant turn is drawn. `--dataset` takes any Hub id or folder of that form; without it, digit scenes.
All options of `SFTConfig` work: --learning_rate, --max_steps, --bf16, --gradient_checkpointing, --push_to_hub, ...
"""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import load_dataset
from scenes_dataset import scenes_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed
from trl import SFTConfig, SFTTrainer, TrlParser

from uc_adapters import UniCompressCollator, UniCompressModel


@dataclass
class FinetuneArguments:
    """What to train on; how is SFTConfig's."""

    base: str = field(default="model_cards/tiny-janus", metadata={"help": "The dense base: folder or Hub id."})
    adapter: str = field(default="work/stage1", metadata={"help": "The adapter of stage 1: folder or Hub id."})
    dataset: str | None = field(default=None, metadata={"help": "Rows of messages and images. None: digit scenes."})
    caption_dropout: float = field(default=0.1, metadata={"help": "Share of drawing prompts dropped, for guidance."})


def main(args: FinetuneArguments, training: SFTConfig) -> None:
    set_seed(training.seed)
    base = AutoModelForImageTextToText.from_pretrained(args.base)
    model = UniCompressModel.from_pretrained(base, args.adapter, is_trainable=True)
    model.train_only("language model")
    model.print_trainable_parameters()
    processor = AutoProcessor.from_pretrained(args.adapter)
    if args.dataset is None:
        rows = training.max_steps * training.per_device_train_batch_size * training.gradient_accumulation_steps
        dataset = scenes_dataset(max(rows, 1), training.seed + 1)
    else:
        dataset = load_dataset(args.dataset, split="train")
    training.max_length, training.packing, training.remove_unused_columns = None, False, False
    training.dataset_kwargs = {"skip_prepare_dataset": True}
    trainer = SFTTrainer(
        model=model,
        args=training,
        train_dataset=dataset,
        processing_class=processor,
        data_collator=UniCompressCollator(processor, model.active_peft_config, args.caption_dropout),
    )
    trainer.train()
    model.save_pretrained(training.output_dir)
    processor.save_pretrained(training.output_dir)


if __name__ == "__main__":
    main(*TrlParser((FinetuneArguments, SFTConfig)).parse_args_and_config())
