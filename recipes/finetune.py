"""Stage 2: fine-tunes an adapter on reading and drawing with the stock `trl.SFTTrainer`, tokenizer side frozen.

    python recipes/finetune.py --base model_cards/tiny-janus --adapter work/stage1 --output_dir work/stage2

Needs: pip install -c constraints.txt -e ".[recipes]". Tested on two CPU cores.

Rows are TRL's conversational vision format, {"messages": [...], "images": [...]}: an image in a user turn is read, an
image in an assistant turn is drawn. `--dataset` takes any Hub id or folder of that form; without it, digit scenes.
All options of `SFTConfig` work: --learning_rate, --max_steps, --bf16, --gradient_checkpointing, ...; --push_to_hub
--hub_model_id org/name pushes the finished adapter as a repo of its own, with a card that tells how it was trained.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from datasets import load_dataset
from scenes_dataset import scenes_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed
from trl import SFTConfig, SFTTrainer, TrlParser

from uc_adapters import CardFacts, UniCompressCollator, UniCompressModel, push_folder


@dataclass
class FinetuneArguments:
    """What to train on; how is SFTConfig's."""

    base: str = field(default="model_cards/tiny-janus", metadata={"help": "The dense base: folder or Hub id."})
    base_id: str | None = field(default=None, metadata={"help": "The base's Hub id, where --base is a folder: for the card."})
    adapter: str = field(default="work/stage1", metadata={"help": "The adapter of stage 1: folder or Hub id."})
    dataset: str | None = field(default=None, metadata={"help": "Rows of messages and images. None: digit scenes."})
    caption_dropout: float = field(default=0.1, metadata={"help": "Share of drawing prompts dropped, for guidance."})


def card_facts(args: FinetuneArguments, training: SFTConfig, seconds: float, rows: int) -> CardFacts:
    """How the adapter was trained, for its card."""
    settings = {
        "recipe": "`recipes/finetune.py`, stock `trl.SFTTrainer`",
        "data": args.dataset or "digit scenes of the train scans",
        "rows": f"{rows:,}",
        "steps": f"{training.max_steps if training.max_steps > 0 else f'{training.num_train_epochs:g} epochs'}",
        "batch": training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size,
        "learning rate": f"{training.learning_rate:g}, {training.lr_scheduler_type.value}",
        "caption dropout": args.caption_dropout,
        "seed": training.seed,
        "time": f"{seconds:.0f} s on {training.world_size} x {training.device.type}",
        "versions": ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "peft", "trl")),
    }
    return CardFacts(datasets=[args.dataset] if args.dataset and not Path(args.dataset).exists() else [], training=settings)


def main(args: FinetuneArguments, training: SFTConfig) -> None:
    set_seed(training.seed)
    push, training.push_to_hub = training.push_to_hub, False  # the finished adapter is pushed, not the trainer's folder
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
    start = time.perf_counter()
    trainer.train()
    if not trainer.is_world_process_zero():
        return
    card = card_facts(args, training, time.perf_counter() - start, len(dataset))
    model.save_pretrained(training.output_dir, processor=processor, base_model=args.base_id, card=card)
    if push:
        repo_id = training.hub_model_id or Path(training.output_dir).name
        print(push_folder(training.output_dir, repo_id, private=training.hub_private_repo, token=training.hub_token))


if __name__ == "__main__":
    main(*TrlParser((FinetuneArguments, SFTConfig)).parse_args_and_config())
