"""Trains an adapter for any supported base on any dataset: stage 1, then stage 2 (UniCompress, section 3).

    python recipes/finetune.py --config recipes/configs/tiny.yaml
    python recipes/finetune.py --config recipes/configs/janus_pro_1b.yaml --dataset your-org/conversations
    torchrun --nproc_per_node 2 recipes/finetune.py --config ...

Needs: pip install -c constraints.txt -e ".[recipes]". Tested on two CPU cores, with one process and with two.

`--dataset` takes Hub ids, folders (images with metadata.jsonl, parquet, ...) and files, with the columns
    messages + images           TRL's conversational vision format: images of user turns are read, of assistant turns drawn
    image + text                each image is drawn from its text, and described by it
    image + question + answer   the image is read
    image + question, or text   with `--distill`: the dense base answers the question, draws the text
Without it, digit scenes. Several are mixed by `--dataset_weights`. Stage 1 (`tokenizer_stage.py`) is saved in
OUTPUT_DIR/stage1; `--adapter A` begins with stage 2, from an adapter that is there. Options of `SFTConfig` work, but for those
about preparing text and about evaluation, and apply to both stages but for those that stage 1 has its own of. A run that was
cut off goes on with `--resume true`, to the same weights. `--push_to_hub --hub_model_id org/name` pushes the finished adapter,
with a card that tells how it was trained.
"""

from __future__ import annotations

import copy
import time
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from conversations import AnyDataset, samples
from datasets import Dataset, IterableDataset
from digits import check_scene_size
from distillation import DistillingTrainer, filled_in, teacher_collator
from finetune_arguments import FinetuneArguments, TrainingConfig
from joint_stage import JointTrainer
from latent_cache import with_latents
from peft.utils import CONFIG_NAME
from quantised import quantisation
from resumable import TrainingError, begin_run, last_checkpoint
from sample_pictures import SamplePictures, caption_of, drawings, is_drawn, reconstructions
from scenes_dataset import scenes_dataset
from tokenizer_stage import ImageCollator, TokenizerStage, TokenizerTrainer
from training_rows import RowCheck, places_of, training_rows
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin, set_seed
from trl import TrlParser

from uc_adapters import CardFacts, UniCompressCollator, UniCompressModel, get_uc_model, push_folder

ENOUGH_PERPLEXITY = 2.0  # of a global token's codes: below it, it has collapsed
SHOWN = 6  # samples in a picture
DTYPES = ("auto", "float32", "bfloat16", "float16")


def leave_batches_to_the_collator(training: TrainingConfig) -> None:
    """Rows reach the collator as they are, and its batches the model."""
    training.max_length, training.packing, training.remove_unused_columns = None, False, False
    training.dataset_kwargs = {"skip_prepare_dataset": True}
    training.accelerator_config.dispatch_batches = False  # batches of unequal shapes are not cut up by one process
    training.ddp_find_unused_parameters = False  # every weight has its gradient in every batch, whatever that holds


def load_base(args: FinetuneArguments, training: TrainingConfig) -> PreTrainedModel:
    """The dense base; quantised, it is loaded where it stays."""
    options = {"dtype": args.dtype}
    if args.quantize is not None:
        options |= {"quantization_config": quantisation(args.base, args.quantize), "device_map": {"": training.device}}
    return AutoModelForImageTextToText.from_pretrained(args.base, **options)


def make_rows(
    args: FinetuneArguments, training: TrainingConfig, model: UniCompressModel, processor: ProcessorMixin, dense: ProcessorMixin
) -> tuple[AnyDataset, AnyDataset]:
    """Rows of stage 1, each image once, and of stage 2; `dense` is the base's own processor."""
    if args.dataset is None:
        check_scene_size(model.family.geometry.image_size)
        rows = training.max_steps * training.train_batch_size * training.gradient_accumulation_steps * training.world_size
        return scenes_dataset(8192, training.seed), scenes_dataset(max(rows, 1), training.seed + 1)
    collator = UniCompressCollator(processor, model.active_peft_config)
    context = model.get_base_model().config.get_text_config().max_position_embeddings
    teacher = teacher_collator(collator, dense) if args.distill else None
    with training.main_process_first(desc="reading the datasets"):
        rows = training_rows(
            args.dataset,
            RowCheck(collator, context, partial(places_of, model), teacher),
            weights=args.dataset_weights,
            streaming=args.streaming,
            skip_bad_rows=args.skip_bad_rows,
            seed=training.seed,
            fill_in=None if not args.distill else lambda source: filled_in(source, model, dense, training.seed),
            encode=None if model.drawing is None or args.streaming else lambda source: with_latents(source, model, processor),
        )
        images = rows.filter(lambda first, images: first and bool(images), input_columns=["first", "images"])
    return samples(images), samples(rows)


def train_stage_1(
    args: FinetuneArguments, training: TrainingConfig, model: UniCompressModel, processor: ProcessorMixin, rows: AnyDataset
) -> float | None:
    """Trains the tokenizer side, with checkpoints in OUTPUT_DIR/stage1.

    Returns:
        The perplexity of the least used global token's codes; None where none is drawn.
    """
    if isinstance(rows, Dataset) and not len(rows):
        raise TrainingError(
            "No row has an image, and stage 1 learns from images; expected some, or --adapter with stage 1 done."
        )
    stage, training = TokenizerStage(model), copy.copy(training)
    if not stage.trained:
        print("stage 1: nothing to learn, without global tokens and without a decompressor that works after the loop")
        return None
    training.output_dir = str(Path(training.output_dir, "stage1"))
    training.max_steps, training.learning_rate = args.stage_1_steps, args.stage_1_learning_rate
    training.per_device_train_batch_size, training.gradient_accumulation_steps = args.stage_1_batch_size, 1
    training.gradient_checkpointing = training.activation_checkpointing = False  # the old name and the new
    folder = Path(training.output_dir)
    collator = ImageCollator(processor, model.family.geometry.code_width)
    trainer = TokenizerTrainer(model=stage, args=training, train_dataset=rows, data_collator=collator)
    if training.fsdp:
        raise TrainingError("Stage 1 trains some millions of weights and is not sharded: run it with --stage 1 and torchrun.")
    if args.sample_steps and "decompressor" in stage.trained:
        shown = [row["images"][0] for row in islice(rows, SHOWN)]
        trainer.add_callback(
            SamplePictures(
                args.sample_steps,
                folder / "samples",
                [""] * len(shown),
                lambda: {"image": shown, "given back": reconstructions(model, processor, shown, stage.give_back)},
            )
        )
    checkpoint = last_checkpoint(folder) if args.resume else None
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if model.drawing is None or not model.drawing.module.num_global_codes:
        return None
    return stage.least_perplexity(list(islice(rows, 512)), collator)


def check_global_codes(perplexity: float) -> None:
    """Stops where a global token says the same of every image: stage 2 would learn to draw it in vain."""
    print(f"global codes: perplexity of the least used token {perplexity:.1f}")
    if perplexity < ENOUGH_PERPLEXITY:
        raise TrainingError(
            f"A global token collapsed: perplexity {perplexity:.2f} over its codes, expected {ENOUGH_PERPLEXITY:g} or "
            "more. Train longer (--stage_1_steps), or with a lower --stage_1_learning_rate."
        )


def train_stage_2(
    args: FinetuneArguments,
    training: TrainingConfig,
    model: UniCompressModel,
    processor: ProcessorMixin,
    dense: ProcessorMixin,
    rows: AnyDataset,
) -> None:
    """Trains the language side, and saves the adapter in OUTPUT_DIR."""
    set_seed(training.seed)  # its own: the same whether stage 1 has just run or lies on the disk
    folder = Path(training.output_dir)
    collator = UniCompressCollator(processor, model.active_peft_config, args.caption_dropout)
    make_trainer = partial(DistillingTrainer, teacher_processor=dense) if args.distill else JointTrainer
    trainer = make_trainer(model=model, args=training, train_dataset=rows, processing_class=processor, data_collator=collator)
    if training.fsdp and not trainer.is_fsdp_enabled:
        raise TrainingError("--fsdp on CPUs: accelerate shards on accelerators alone, and would train each process as a whole.")
    if args.distill and trainer.is_fsdp_enabled:
        raise TrainingError("--distill with FSDP: the teacher is the base itself, and its sharded weights cannot be run twice.")
    model.print_trainable_parameters()
    drawn = list(islice((row for row in islice(rows, 64) if is_drawn(row)), SHOWN)) if args.sample_steps else []
    if drawn and not trainer.is_fsdp_enabled:  # sharded weights cannot draw on one process alone
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
    sharded = {"state_dict": trainer.accelerator.get_state_dict(trainer.model)} if trainer.is_fsdp_enabled else {}
    model.save_pretrained(
        folder,
        processor=processor,
        base_model=args.base_id,
        card=card_facts(args, training, time.perf_counter() - start, rows),
        is_main_process=training.should_save,
        **sharded,
    )


def card_facts(args: FinetuneArguments, training: TrainingConfig, seconds: float, rows: AnyDataset) -> CardFacts:
    """How the adapter was trained, for its card."""
    sources, epochs = args.dataset or [], f"{training.num_train_epochs:g} epochs"
    settings = {
        "recipe": f"`recipes/finetune.py{' --distill' if args.distill else ''}`, stock `trl.SFTTrainer`",
        "data": ", ".join(sources) or "digit scenes of the train scans",
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


def main(args: FinetuneArguments, training: TrainingConfig) -> None:
    if args.stage not in (None, 1, 2):
        raise SystemExit(f"--stage {args.stage} is not known; expected 1, 2, or nothing for both.")
    if args.streaming and training.max_steps <= 0:
        raise SystemExit(f"--streaming with --max_steps {training.max_steps}: nobody knows how long it is; expected a number.")
    if args.streaming and args.distill:
        raise SystemExit("--streaming with --distill: what the base fills in is kept on the disk; expected one of them.")
    if args.dtype not in DTYPES:
        raise SystemExit(f"--dtype {args.dtype} is not known; expected one of {', '.join(DTYPES)}.")
    if args.stage == 1 and args.adapter:
        raise SystemExit(f"--stage 1 with --adapter {args.adapter}: with that, stage 1 is done; expected one of them.")
    set_seed(training.seed)
    push, training.push_to_hub = training.push_to_hub, False  # the finished adapter is pushed, not the trainer's folder
    leave_batches_to_the_collator(training)
    folder = Path(training.output_dir)
    stage_1 = Path(args.adapter or folder / "stage1")
    if args.stage == 2 and not args.adapter and not (stage_1 / CONFIG_NAME).is_file():
        raise SystemExit(
            f"--stage 2, and {stage_1} holds no adapter; expected one: run --stage 1 with this --output_dir first, or name one "
            "with --adapter."
        )
    done = args.stage == 2 or args.adapter or (args.resume and (stage_1 / CONFIG_NAME).is_file())
    stages = ([] if done else [stage_1]) + ([] if args.stage == 1 else [folder])
    begin_run(folder, args.settings, training, args.resume, stages)
    base = load_base(args, training)
    if done:
        model = UniCompressModel.from_pretrained(base, args.adapter or stage_1, is_trainable=True)
    else:
        model = get_uc_model(base, args.config())
    if args.quantize is None:
        model = model.to(training.device)
    dense = AutoProcessor.from_pretrained(args.base)
    if training.chat_template_path is not None:  # for a base without one, such as Chameleon
        dense.chat_template, training.chat_template_path = Path(training.chat_template_path).read_text(), None
    processor = model.compact_processor(dense)
    of_stage_1, of_stage_2 = make_rows(args, training, model, processor, dense)
    if not done:
        perplexity = train_stage_1(args, training, model, processor, of_stage_1)
        if perplexity is not None:
            check_global_codes(perplexity)
        model.save_pretrained(stage_1, processor=processor, base_model=args.base_id, is_main_process=training.should_save)
    if args.stage == 1:
        return
    train_stage_2(args, training, model, processor, dense, of_stage_2)
    if push and training.should_save:
        repo_id = training.hub_model_id or Path(training.output_dir).name
        print(push_folder(training.output_dir, repo_id, private=training.hub_private_repo, token=training.hub_token))


if __name__ == "__main__":
    main(*TrlParser((FinetuneArguments, TrainingConfig)).parse_args_and_config())
