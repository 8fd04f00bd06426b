"""Makes the rows and the collator of a run."""

from __future__ import annotations

from functools import partial

from datasets import Dataset
from finetuning.answers import filled_in
from finetuning.arguments import FinetuneArguments, TrainingConfig
from rows.conversations import AnyDataset, column_names, samples
from rows.latent_cache import with_latents
from rows.training_rows import Part, RowCheck, places_of, training_rows
from tiny_world.digits import check_scene_size
from tiny_world.scenes_dataset import scenes_dataset
from transformers import ProcessorMixin

from uc_adapters import UniCompressCollator, UniCompressModel
from uc_adapters.training import teacher_collator

SCENES = 8192  # rows without --dataset: of stage 1, and of an epoch of stage 2


def make_collator(args: FinetuneArguments, model: UniCompressModel, processor: ProcessorMixin) -> UniCompressCollator:
    """The collator for an adapter and its `processor`; it ends answers with the token that ends the base's generation."""
    ends = model.get_base_model().generation_config.eos_token_id
    return UniCompressCollator(processor, model.active_peft_config, args.caption_dropout, eos_token_id=ends)


def make_rows(
    args: FinetuneArguments,
    training: TrainingConfig,
    model: UniCompressModel,
    collator: UniCompressCollator,
    dense: ProcessorMixin,
) -> tuple[AnyDataset, AnyDataset, Dataset | None]:
    """Loads or makes the rows of a run; `dense` is the base's own processor.

    Returns:
        The rows of stage 1 (each image once), those of stage 2, and those to evaluate on (None if there are none).
    """
    if args.dataset is None:
        check_scene_size(model.family.geometry.image_size)
        rows_per_step = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
        count = training.max_steps * rows_per_step if training.max_steps > 0 else SCENES
        scenes = partial(scenes_dataset, draws=model.family.why_no_drawing is None)
        return scenes(SCENES, training.seed), scenes(count, training.seed + 1), None
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
            if model.code_head is None or streaming
            else lambda source: with_latents(source, model, collator.processor),
        )

    with training.main_process_first(desc="reading the datasets"):
        rows = read(args.dataset, args.split, False, args.dataset_weights, args.streaming)
        held_out = None
        if args.eval_share or args.eval_dataset or args.eval_split:
            held_out = read(args.eval_dataset or args.dataset, args.eval_split or args.split, True)
        images = rows.filter(lambda first, images: first and bool(images), input_columns=["first", "images"])
    return samples(images), samples(rows), None if held_out is None else samples(held_out)
