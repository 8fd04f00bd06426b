"""Trains an adapter for any supported base on any dataset: stage 1, then stage 2 (UniCompress, section 3).

    python recipes/finetune.py --config recipes/configs/tiny.yaml
    python recipes/finetune.py --config recipes/configs/janus_pro_1b.yaml --dataset your-org/conversations
    torchrun --nproc_per_node 2 recipes/finetune.py --config ...

Needs: pip install -c constraints.txt -e ".[recipes]". Tested on two CPU cores, with one process and with two.

`--help` lists the options, docs/training.md the data that it takes. Without `--dataset` it trains on digit scenes. Stage 1
(`tokenizer_stage.py`) is saved in OUTPUT_DIR/stage1; `--adapter A` begins with stage 2, from an adapter that is there. A run
that was cut off goes on with `--resume true`, to the same weights. `--push_to_hub --hub_model_id org/name` pushes the finished
adapter, with a card that tells how it was trained.
"""

from __future__ import annotations

import copy
import math
import time
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from conversations import AnyDataset, column_names, samples
from datasets import Dataset, IterableDataset
from digits import check_scene_size
from distillation import DistillingTrainer, filled_in, teacher_collator
from finetune_arguments import FinetuneArguments, FinetuneParser, TrainingConfig
from joint_stage import JointTrainer
from latent_cache import with_latents
from peft.utils import CONFIG_NAME
from quantised import quantisation
from resumable import TrainingError, begin_run, check_warm_up, last_checkpoint
from sample_pictures import SamplePictures, caption_of, drawings, is_drawn, reconstructions
from scenes_dataset import scenes_dataset
from tokenizer_stage import ImageCollator, TokenizerStage, TokenizerTrainer
from training_rows import Part, RowCheck, places_of, training_rows
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    EarlyStoppingCallback,
    IntervalStrategy,
    PreTrainedModel,
    ProcessorMixin,
    set_seed,
)

from uc_adapters import (
    CardFacts,
    UniCompressCollator,
    UniCompressConfig,
    UniCompressModel,
    check_push,
    get_uc_model,
    push_folder,
)

ENOUGH_PERPLEXITY = 2.0  # of a global token's codes: below it, it has collapsed
SHOWN = 6  # samples in a picture
SCENES = 8192  # of digits, where no dataset is named: those of stage 1, and of an epoch of stage 2
DTYPES = ("auto", "float32", "bfloat16", "float16")


def leave_batches_to_the_collator(training: TrainingConfig) -> None:
    """Rows reach the collator as they are, and its batches the model."""
    training.max_length, training.packing, training.remove_unused_columns = None, False, False
    training.dataset_kwargs = {"skip_prepare_dataset": True}
    training.accelerator_config.dispatch_batches = False  # batches of unequal shapes are not cut up by one process
    training.ddp_find_unused_parameters = False  # every weight has its gradient in every batch, whatever that holds


def evaluate_where_asked(args: FinetuneArguments, training: TrainingConfig) -> None:
    """Where there are rows to evaluate on, evaluation goes with the checkpoints, unless the options say otherwise.

    Raises:
        SystemExit: Options about evaluation without rows for it, or two ways to choose them.
    """
    rows = args.eval_dataset is not None or args.eval_split is not None
    if rows and args.eval_share:
        raise SystemExit(f"--eval_share {args.eval_share:g} with --eval_dataset or --eval_split; expected one of them.")
    if (rows or args.eval_share) and args.dataset is None:
        raise SystemExit(
            "--eval_dataset, --eval_split or --eval_share without --dataset; expected one: name the rows to train on."
        )
    if args.streaming and args.eval_share:
        raise SystemExit("--streaming with --eval_share: nobody knows how many rows there are; expected an --eval_dataset.")
    if not (rows or args.eval_share):
        if args.early_stopping or training.load_best_model_at_end or training.eval_strategy != "no":
            raise SystemExit(
                "--early_stopping, --load_best_model_at_end or --eval_strategy without rows to evaluate on; expected "
                "--eval_dataset, --eval_split or --eval_share."
            )
        return
    training.prediction_loss_only = True  # logits of all rows would fill the memory
    if training.eval_strategy == "no":
        training.eval_strategy, training.eval_steps = training.save_strategy, training.save_steps
    training.load_best_model_at_end = training.load_best_model_at_end or args.early_stopping > 0


def load_base(args: FinetuneArguments, training: TrainingConfig) -> PreTrainedModel:
    """The dense base; quantised, it is loaded where it stays."""
    options = {"dtype": args.dtype}
    if args.quantize is not None:
        options |= {"quantization_config": quantisation(args.base, args.quantize), "device_map": {"": training.device}}
    return AutoModelForImageTextToText.from_pretrained(args.base, **options)


def make_collator(args: FinetuneArguments, model: UniCompressModel, processor: ProcessorMixin) -> UniCompressCollator:
    """The collator of an adapter, which ends answers as the base's own generation does; `processor` is the adapter's."""
    ends = model.get_base_model().generation_config.eos_token_id
    return UniCompressCollator(processor, model.active_peft_config, args.caption_dropout, eos_token_id=ends)


def make_rows(
    args: FinetuneArguments,
    training: TrainingConfig,
    model: UniCompressModel,
    collator: UniCompressCollator,
    dense: ProcessorMixin,
) -> tuple[AnyDataset, AnyDataset, Dataset | None]:
    """Rows of stage 1, each image once, of stage 2, and to evaluate on; `dense` is the base's own processor."""
    if args.dataset is None:
        check_scene_size(model.family.geometry.image_size)
        of_step = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
        count = training.max_steps * of_step if training.max_steps > 0 else SCENES
        return scenes_dataset(SCENES, training.seed), scenes_dataset(count, training.seed + 1), None
    context = model.get_base_model().config.get_text_config().max_position_embeddings
    check = RowCheck(collator, context, partial(places_of, model), teacher_collator(collator, dense) if args.distill else None)

    def read(sources: list[str], split: str, evaluation: bool, weights=None, streaming: bool = False) -> AnyDataset:
        return training_rows(
            sources,
            check,
            split=split,
            columns=column_names(args.columns),
            weights=weights,
            part=Part(args.eval_share, evaluation, training.seed) if args.eval_share else None,
            streaming=streaming,
            skip_bad_rows=args.skip_bad_rows,
            seed=training.seed,
            fill_in=None if not args.distill else lambda source: filled_in(source, model, dense, training.seed),
            encode=None
            if model.drawing is None or streaming
            else lambda source: with_latents(source, model, collator.processor),
        )

    with training.main_process_first(desc="reading the datasets"):
        rows = read(args.dataset, args.split, False, args.dataset_weights, args.streaming)
        held_out = None
        if args.eval_share or args.eval_dataset or args.eval_split:
            held_out = read(args.eval_dataset or args.dataset, args.eval_split or args.split, True)
        images = rows.filter(lambda first, images: first and bool(images), input_columns=["first", "images"])
    return samples(images), samples(rows), None if held_out is None else samples(held_out)


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
    training.eval_strategy, training.load_best_model_at_end = IntervalStrategy.NO, False
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


def steps_of(training: TrainingConfig, rows: AnyDataset) -> int:
    """Of the language side."""
    if training.max_steps > 0:
        return training.max_steps
    of_step = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    return math.ceil(len(rows) * training.num_train_epochs / of_step)


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
    collator: UniCompressCollator,
    dense: ProcessorMixin,
    rows: AnyDataset,
    held_out: Dataset | None = None,
) -> None:
    """Trains the language side, and saves the adapter in OUTPUT_DIR."""
    set_seed(training.seed)  # its own: the same whether stage 1 has just run or lies on the disk
    folder, processor = Path(training.output_dir), collator.processor
    make_trainer = partial(DistillingTrainer, teacher_processor=dense) if args.distill else JointTrainer
    trainer = make_trainer(
        model=model,
        args=training,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=processor,
        data_collator=collator,
        callbacks=[EarlyStoppingCallback(args.early_stopping)] if args.early_stopping else None,
    )
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
    evaluate_where_asked(args, training)
    set_seed(training.seed)
    push, training.push_to_hub = training.push_to_hub, False  # the finished adapter is pushed, not the trainer's folder
    repo_id = training.hub_model_id or Path(training.output_dir).name
    if push and training.should_save:
        check_push(repo_id, args.base_id or args.base, token=training.hub_token)
    leave_batches_to_the_collator(training)
    folder = Path(training.output_dir)
    stage_1 = Path(args.adapter or folder / "stage1")
    if args.stage == 2 and not args.adapter and not (stage_1 / CONFIG_NAME).is_file():
        raise SystemExit(
            f"--stage 2, and {stage_1} holds no adapter; expected one: run --stage 1 with this --output_dir first, or name one "
            "with --adapter."
        )
    done = args.stage == 2 or args.adapter or (args.resume and (stage_1 / CONFIG_NAME).is_file())
    if done and (differences := args.differences(UniCompressConfig.from_pretrained(stage_1))):
        raise SystemExit(
            f"{stage_1} is an adapter of other settings ({'; '.join(differences)}); expected its own. Leave these options out, "
            "or train a new adapter, without --adapter."
        )
    stages = ([] if done else [stage_1]) + ([] if args.stage == 1 else [folder])
    begin_run(folder, args.settings, training, args.resume, stages)
    base = load_base(args, training)
    if done:
        model = UniCompressModel.from_pretrained(base, args.adapter or stage_1, is_trainable=True)
        print(f"stage 1: done before, in {stage_1}; its options are not used")
    else:
        model = get_uc_model(base, args.config())
    if args.quantize is None:
        model = model.to(training.device)
    dense = AutoProcessor.from_pretrained(args.base)
    if training.chat_template_path is not None:  # for a base without one, such as Chameleon
        dense.chat_template, training.chat_template_path = Path(training.chat_template_path).read_text(), None
    processor = model.compact_processor(dense)
    collator = make_collator(args, model, processor)
    of_stage_1, of_stage_2, to_evaluate = make_rows(args, training, model, collator, dense)
    for steps in ([] if done else [args.stage_1_steps]) + ([] if args.stage == 1 else [steps_of(training, of_stage_2)]):
        check_warm_up(training, steps)
    if not done:
        perplexity = train_stage_1(args, training, model, processor, of_stage_1)
        if perplexity is not None:
            check_global_codes(perplexity)
        model.save_pretrained(stage_1, processor=processor, base_model=args.base_id, is_main_process=training.should_save)
    if args.stage == 1:
        return
    train_stage_2(args, training, model, collator, dense, of_stage_2, to_evaluate)
    if push and training.should_save:
        print(push_folder(training.output_dir, repo_id, private=training.hub_private_repo, token=training.hub_token))


if __name__ == "__main__":
    main(*FinetuneParser().parse_args_and_config())
