"""Checks the options of a run, writes its settings down when it begins, and compares them when it is resumed."""

from __future__ import annotations

import json
from pathlib import Path

from finetuning.arguments import FinetuneArguments, TrainingConfig
from peft.utils import CONFIG_NAME
from transformers import TrainingArguments
from transformers.trainer import PREFIX_CHECKPOINT_DIR

from uc_adapters import UniCompressConfig
from uc_adapters.training import TrainingError, last_checkpoint

RUN_FILE = "run.json"
# The fields of TrainingArguments that decide which weights a seeded run ends with
DECISIVE = (
    *("seed", "data_seed", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "max_grad_norm", "bf16", "fp16", "world_size"),
)
# Those of a run's settings that decide which rows it takes, and how many scenes there are without --dataset
ROWS = ("dataset", "split", "dataset_weights", "eval_share", "streaming", "skip_bad_rows")
SCENES = ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
BITS = ("8bit", "4bit")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_options(args: FinetuneArguments, training: TrainingConfig) -> None:
    """Raises SystemExit if options contradict each other, and sets the options that follow from others."""
    if args.stage not in (None, 1, 2):
        raise SystemExit(f"--stage {args.stage} is not known; expected 1, 2, or no --stage for both.")
    if args.streaming and training.max_steps <= 0:
        raise SystemExit(
            f"--streaming with --max_steps {training.max_steps}: the length of a stream is unknown; expected a number of steps."
        )
    if args.streaming and args.distill:
        raise SystemExit("--streaming with --distill; expected one of them: what the base fills in is kept on disk.")
    if args.dtype not in DTYPES:
        raise SystemExit(f"--dtype {args.dtype} is not known; expected one of {', '.join(DTYPES)}.")
    if args.quantize not in (None, *BITS):
        raise SystemExit(f"--quantize {args.quantize!r} is not known; expected {' or '.join(BITS)}.")
    if args.stage == 1 and args.adapter:
        raise SystemExit(f"--stage 1 with --adapter {args.adapter}; expected one of them: that adapter has finished stage 1.")
    _evaluate_where_asked(args, training)


def stage_1_is_done(args: FinetuneArguments, stage_1: Path) -> bool:
    """Whether the adapter in a folder has finished stage 1, by the options or by the run to resume.

    Raises:
        SystemExit: The folder holds no adapter, or one whose settings differ from the options.
    """
    there = (stage_1 / CONFIG_NAME).is_file()
    if args.stage == 2 and not args.adapter and not there:
        raise SystemExit(
            f"--stage 2, and {stage_1} holds no adapter; expected one: run --stage 1 with this --output_dir first, or name one "
            "with --adapter."
        )
    done = bool(args.stage == 2 or args.adapter or (args.resume and there))
    if done and (differences := args.differences(UniCompressConfig.from_pretrained(stage_1))):
        raise SystemExit(
            f"{stage_1} is an adapter of other settings ({'; '.join(differences)}); expected its own. Leave these options out, "
            "or train a new adapter, without --adapter."
        )
    return done


def check_warm_up(training: TrainingArguments, steps: int) -> None:
    """Raises TrainingError if the warm-up is as long as a run of `steps` steps; a warm-up that is a share never is."""
    if 1 <= training.warmup_steps >= steps:
        raise TrainingError(
            f"--warmup_steps {training.warmup_steps:g} in a run of {steps} step(s): the learning rate would never reach its "
            "peak; expected fewer, or a share below 1, such as 0.03."
        )


def begin_run(folder: Path, settings: dict, training: TrainingArguments, resume: bool, stages: list[Path]) -> None:
    """Writes down the settings of a new run; compares those of a resumed one with the settings that it began with.

    Args:
        folder: Folder of the run.
        settings: The settings that decide its outcome, beside `training`.
        training: Arguments of stage 2.
        resume: Whether to continue a run.
        stages: Folders where checkpoints will be written.

    Raises:
        TrainingError: There is no run to resume, it had other settings, or a new run would mix with an older one.
    """
    file, arguments = folder / RUN_FILE, training.to_dict() | {"world_size": training.world_size}
    settings = json.loads(json.dumps(settings | {name: arguments[name] for name in DECISIVE}))
    if not resume:
        older = [stage for stage in stages if any(stage.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))]
        if older:
            raise TrainingError(
                f"{older[0]} holds checkpoints of an earlier run. Continue it with --resume true, choose another "
                "--output_dir, or remove the folder."
            )
        if training.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(settings, indent=2) + "\n")
            _say_if_captions_are_the_same(settings)
        return
    if not file.is_file():
        raise TrainingError(
            f"--resume true, but no run began in {folder} ({RUN_FILE} is missing); expected the --output_dir of a run."
        )
    began = json.loads(file.read_text())
    other = [f"{name}: {began.get(name)!r} then, {value!r} now" for name, value in settings.items() if began.get(name) != value]
    if other:
        raise TrainingError(
            f"--resume true, but the run in {folder} began with other settings ({'; '.join(other)}). Resume it with its own. "
            "To train its weights with the new ones, start a run in another --output_dir with "
            f"--adapter {last_checkpoint(folder) or folder}."
        )


def _say_if_captions_are_the_same(settings: dict) -> None:
    """Prints a line if a run goes on from an adapter and drops the captions that the adapter's own run dropped.

    The seed decides them, by the rows' places. It also decides the order, but for a stream, which has one order.
    """
    adapter = Path(settings["adapter"] or "")
    run = adapter.parent if adapter.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") else adapter
    if settings["adapter"] is None or not (run / RUN_FILE).is_file():
        return
    last = json.loads((run / RUN_FILE).read_text())
    decisive = (*ROWS, "seed", *(SCENES if settings["dataset"] is None else ()))
    if any(last.get(name) != settings[name] for name in decisive):
        return
    order = ""
    if settings["streaming"] or last.get("data_seed") == settings["data_seed"]:
        order = ", and the rows come in its order"
    print(
        f"The same captions are dropped as in the run of {adapter}{order}, since data and --seed {settings['seed']} are the "
        f"same. Name another --seed to {'drop others' if settings['streaming'] else 'go on with other batches'}."
    )


def _evaluate_where_asked(args: FinetuneArguments, training: TrainingConfig) -> None:
    """Evaluates at every checkpoint if there are rows to evaluate on, unless the options say otherwise.

    Raises:
        SystemExit: Options about evaluation without rows for it, or two ways to choose these rows.
    """
    rows = args.eval_dataset is not None or args.eval_split is not None
    if rows and args.eval_share:
        raise SystemExit(f"--eval_share {args.eval_share:g} with --eval_dataset or --eval_split; expected one of them.")
    if (rows or args.eval_share) and args.dataset is None:
        raise SystemExit(
            "--eval_dataset, --eval_split or --eval_share without --dataset; expected one: name the rows to train on."
        )
    if args.streaming and args.eval_share:
        raise SystemExit("--streaming with --eval_share: a stream has no known number of rows; expected an --eval_dataset.")
    if not (rows or args.eval_share):
        if args.early_stopping or training.load_best_model_at_end or training.eval_strategy != "no":
            raise SystemExit(
                "--early_stopping, --load_best_model_at_end or --eval_strategy without rows to evaluate on; expected "
                "--eval_dataset, --eval_split or --eval_share."
            )
        return
    training.prediction_loss_only = True  # the logits of all rows would fill the memory
    if training.eval_strategy == "no":
        training.eval_strategy, training.eval_steps = training.save_strategy, training.save_steps
    training.load_best_model_at_end = training.load_best_model_at_end or args.early_stopping > 0
