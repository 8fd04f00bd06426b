"""Trains an adapter for any supported base on any dataset: stage 1, then stage 2 (UniCompress, section 3).

    python recipes/finetune.py --config recipes/configs/tiny.yaml
    python recipes/finetune.py --config recipes/configs/janus_pro_1b.yaml --dataset your-org/conversations
    torchrun --nproc_per_node 2 recipes/finetune.py --config ...

Needs: pip install -c constraints.txt -e ".[recipes]". Tested on two CPU cores, with one process and with two.

`--help` lists the options; the docs (How-to, Train) describe the data. Without `--dataset` it trains on scenes of digits.
Stage 1 is saved in OUTPUT_DIR/stage1. `--adapter A` trains stage 2 of an existing adapter. `--resume true` continues an
interrupted run and reaches the same weights. `--push_to_hub --hub_model_id org/name` pushes the finished adapter with its card.
The trainers are the package's own, `uc_adapters.training`; this script adds options, datasets and checks.
"""

from __future__ import annotations

from pathlib import Path

from finetuning.arguments import FinetuneArguments, FinetuneParser, TrainingConfig
from finetuning.base import load_base
from finetuning.data import make_collator, make_rows
from finetuning.run import begin_run, check_options, check_warm_up, stage_1_is_done
from finetuning.stages import check_global_codes, save_adapter, steps_of, train_stage_1, train_stage_2
from transformers import AutoProcessor, set_seed

from uc_adapters import UniCompressModel, check_push, get_uc_model, push_folder


def main(args: FinetuneArguments, training: TrainingConfig) -> None:
    check_options(args, training)
    set_seed(training.seed)
    push, training.push_to_hub = training.push_to_hub, False  # push the finished adapter, not the trainer's folder
    folder, repo_id = Path(training.output_dir), training.hub_model_id or Path(training.output_dir).name
    if push and training.should_save:
        check_push(repo_id, args.base_id or args.base, token=training.hub_token)
    stage_1 = Path(args.adapter or folder / "stage1")
    done = stage_1_is_done(args, stage_1)
    begin_run(
        folder, args.settings, training, args.resume, [*([] if done else [stage_1]), *([] if args.stage == 1 else [folder])]
    )

    base = load_base(args, training)
    if done:
        model = UniCompressModel.from_pretrained(base, stage_1, is_trainable=True)
        print(f"stage 1: done before, in {stage_1}; the options of stage 1 are ignored")
    else:
        model = get_uc_model(base, args.config())
    if args.quantize is None:
        model = model.to(training.device)
    dense = AutoProcessor.from_pretrained(args.base)
    if training.chat_template_path is not None:  # for a base without a chat template, such as Chameleon
        dense.chat_template, training.chat_template_path = Path(training.chat_template_path).read_text(), None
    processor = model.compact_processor(dense)
    collator = make_collator(args, model, processor)
    images, rows, held_out = make_rows(args, training, model, collator, dense)

    for steps in ([] if done else [args.stage_1_steps]) + ([] if args.stage == 1 else [steps_of(training, rows)]):
        check_warm_up(training, steps)
    if not done:
        check_global_codes(train_stage_1(args, training, model, processor, images))
        model.save_pretrained(stage_1, processor=processor, base_model=args.base_id, is_main_process=training.should_save)
    if args.stage == 1:
        return
    trainer, seconds = train_stage_2(args, training, model, collator, dense, rows, held_out)
    save_adapter(args, training, trainer, processor, seconds)
    if push and training.should_save:
        print(push_folder(folder, repo_id, private=training.hub_private_repo, token=training.hub_token))


if __name__ == "__main__":
    main(*FinetuneParser().parse_args_and_config())
