"""The two stages of a run (UniCompress, section 3), each with checkpoints, sample pictures and checks."""

from __future__ import annotations

import copy
import math
import time
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from datasets import Dataset, IterableDataset
from finetuning.arguments import FinetuneArguments, TrainingConfig
from finetuning.sample_pictures import SamplePictures, drawings, reconstructions
from rows.captions import caption_of, is_drawn
from rows.conversations import AnyDataset
from transformers import EarlyStoppingCallback, IntervalStrategy, ProcessorMixin, set_seed

from uc_adapters import CardFacts, UniCompressCollator, UniCompressModel
from uc_adapters.training import (
    DistillationTrainer,
    JointTrainer,
    ReconstructionStage,
    ReconstructionTrainer,
    TrainingError,
    last_checkpoint,
)

ENOUGH_PERPLEXITY = 2.0  # of a global token's codes; below it, the token has collapsed
SHOWN = 6  # samples in a picture


def train_stage_1(
    args: FinetuneArguments, training: TrainingConfig, model: UniCompressModel, processor: ProcessorMixin, rows: AnyDataset
) -> float | None:
    """Trains the tokenizer side (stage 1), with checkpoints in OUTPUT_DIR/stage1.

    Returns:
        The perplexity of the least used global token's codes; None without global codes.

    Raises:
        TrainingError: No row has an image, or the run is sharded.
    """
    if isinstance(rows, Dataset) and not len(rows):
        raise TrainingError(
            "No row has an image, and stage 1 learns from images. Expected rows with images, or --adapter with an adapter "
            "that has finished stage 1."
        )
    stage, training = ReconstructionStage(model), copy.copy(training)
    if not stage.trained:
        print("stage 1: nothing to train, since there are no global tokens and no decompressor that works after the loop")
        return None
    training.output_dir = str(Path(training.output_dir, "stage1"))
    training.eval_strategy, training.load_best_model_at_end = IntervalStrategy.NO, False
    training.max_steps, training.learning_rate = args.stage_1_steps, args.stage_1_learning_rate
    training.per_device_train_batch_size, training.gradient_accumulation_steps = args.stage_1_batch_size, 1
    training.gradient_checkpointing = training.activation_checkpointing = False  # the old name of the option, and its new name
    folder = Path(training.output_dir)
    trainer = ReconstructionTrainer(stage, training, processing_class=processor, train_dataset=rows)
    if training.fsdp:
        raise TrainingError(
            "--fsdp in stage 1, which trains some millions of weights and is not sharded. Run it before, with --stage 1 and "
            "torchrun, without --fsdp."
        )
    if shows_pictures(args, model) and "decompressor" in stage.trained:
        shown = [row["images"][0] for row in islice(rows, SHOWN)]
        trainer.add_callback(
            SamplePictures(
                args.sample_steps,
                folder / "samples",
                [""] * len(shown),
                lambda: {"image": shown, "reconstructed": reconstructions(model, processor, shown, stage.give_back)},
            )
        )
    checkpoint = last_checkpoint(folder) if args.resume else None
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if model.code_head is None or not model.code_head.module.num_global_codes:
        return None
    return stage.least_perplexity(list(islice(rows, 512)), trainer.data_collator)


def shows_pictures(args: FinetuneArguments, model: UniCompressModel) -> bool:
    """Whether sample pictures are written. Some bases draw codes, and cannot make pixels of them."""
    return bool(args.sample_steps) and model.family.why_no_pixels is None


def check_global_codes(perplexity: float | None) -> None:
    """Raises TrainingError if a global token is the same for every image: stage 2 would learn to draw it in vain."""
    if perplexity is None:
        return
    print(f"global codes: perplexity of the least used token {perplexity:.1f}")
    if perplexity < ENOUGH_PERPLEXITY:
        raise TrainingError(
            f"A global token collapsed: perplexity {perplexity:.2f} over its codes, expected {ENOUGH_PERPLEXITY:g} or "
            "more. Train longer (--stage_1_steps), or with a lower --stage_1_learning_rate."
        )


def steps_of(training: TrainingConfig, rows: AnyDataset) -> int:
    """The number of optimizer steps of stage 2."""
    if training.max_steps > 0:
        return training.max_steps
    rows_per_step = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    return math.ceil(len(rows) * training.num_train_epochs / rows_per_step)


def train_stage_2(
    args: FinetuneArguments,
    training: TrainingConfig,
    model: UniCompressModel,
    collator: UniCompressCollator,
    dense: ProcessorMixin,
    rows: AnyDataset,
    held_out: Dataset | None = None,
) -> tuple[JointTrainer, float]:
    """Trains the language side (stage 2), with checkpoints in OUTPUT_DIR.

    Returns:
        The trainer, and the seconds that training took.

    Raises:
        TrainingError: FSDP on a CPU, or together with distillation.
    """
    set_seed(training.seed)  # so that a stage 1 that has just run and one loaded from disk give the same stage 2
    folder, processor = Path(training.output_dir), collator.processor
    make_trainer = partial(DistillationTrainer, teacher_processor=dense) if args.distill else JointTrainer
    trainer = make_trainer(
        model,
        training,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=processor,
        data_collator=collator,
        callbacks=[EarlyStoppingCallback(args.early_stopping)] if args.early_stopping else None,
    )
    if training.fsdp and not trainer.is_fsdp_enabled:
        raise TrainingError(
            "--fsdp on a CPU: accelerate shards on accelerators only, and each process would train all weights. Leave it out."
        )
    if args.distill and trainer.is_fsdp_enabled:
        raise TrainingError(
            "--distill with FSDP: the teacher is the base itself, and its sharded weights cannot run twice. Leave one out."
        )
    model.print_trainable_parameters()
    drawn = list(islice((row for row in islice(rows, 64) if is_drawn(row)), SHOWN)) if shows_pictures(args, model) else []
    if drawn and not trainer.is_fsdp_enabled:  # with sharded weights a single process cannot draw
        captions, shown = [caption_of(row) for row in drawn], [row["images"][0] for row in drawn]
        trainer.add_callback(
            SamplePictures(
                args.sample_steps,
                folder / "samples",
                captions,
                lambda: {"image": shown, "drawn": drawings(model, processor, captions)},
            )
        )
    checkpoint, start = last_checkpoint(folder) if args.resume else None, time.perf_counter()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer, time.perf_counter() - start


def save_adapter(
    args: FinetuneArguments, training: TrainingConfig, trainer: JointTrainer, processor: ProcessorMixin, seconds: float
) -> None:
    """Saves the trained adapter in OUTPUT_DIR, with a card that says how it was trained."""
    sharded = {"state_dict": trainer.accelerator.get_state_dict(trainer.model)} if trainer.is_fsdp_enabled else {}
    model: UniCompressModel = trainer.accelerator.unwrap_model(trainer.model)
    model.save_pretrained(
        training.output_dir,
        processor=processor,
        base_model=args.base_id,
        card=card_facts(args, training, seconds, trainer.train_dataset),
        is_main_process=training.should_save,
        **sharded,
    )


def card_facts(args: FinetuneArguments, training: TrainingConfig, seconds: float, rows: AnyDataset) -> CardFacts:
    """The facts about the training that the adapter's card shows."""
    sources, epochs = args.dataset or [], f"{training.num_train_epochs:g} epochs"
    settings = {
        "recipe": f"`recipes/finetune.py{' --distill' if args.distill else ''}`, `trl.SFTTrainer`",
        "data": ", ".join(Path(source).name if Path(source).exists() else source for source in sources)
        or "digit scenes of the train scans",
        "rows": "streamed" if isinstance(rows, IterableDataset) else f"{len(rows):,}",
        "stage 1": "before this run"
        if args.adapter
        else f"{args.stage_1_steps} steps of {args.stage_1_batch_size * training.world_size}, "
        f"learning rate {args.stage_1_learning_rate:g}",
        "steps": f"{training.max_steps if training.max_steps > 0 else epochs}",
        "batch": training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size,
        "learning rate": f"{training.learning_rate:g}, {training.lr_scheduler_type.value}",
        "caption dropout": args.caption_dropout,
        "seed": training.seed,
        "time": f"{seconds:.0f} s on {training.world_size} x {training.device.type}",
        "versions": ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "peft", "trl")),
    }
    return CardFacts(datasets=[source for source in sources if not Path(source).exists()], training=settings)
