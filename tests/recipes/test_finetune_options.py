"""What finetune.py is told: options, evaluation, and what is refused before anything is trained."""

import json
import math
import re
from pathlib import Path

import finetune
import pytest
import torch
from finetune_runs import AT_END, EVERY_STEP, log_of, say, train, turn, write_captioned, write_rows
from finetuning.arguments import GROUPS, NEW_ADAPTER, FinetuneArguments, FinetuneParser, TrainingConfig
from finetuning.run import begin_run
from helpers import ANN
from safetensors.torch import load_file
from transformers import get_scheduler

from uc_adapters import UniCompressConfig
from uc_adapters.errors import BaseModelError, HubError
from uc_adapters.training.resumable import TrainingError

CONFIGS = Path(finetune.__file__).parent / "configs"
ON_CPU = ["--use_cpu", "true", "--bf16", "false"]


def parsed(*args: str) -> tuple[FinetuneArguments, TrainingConfig]:
    return FinetuneParser().parse_args_and_config([*args, *ON_CPU])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    return write_captioned(tmp_path_factory.mktemp("data") / "captioned")


# Steps, epochs and warm-up


@pytest.mark.parametrize(
    ("args", "steps", "epochs"),
    [
        ([], 1350, 3),
        (["--num_train_epochs", "1"], -1, 1),
        (["--num_train_epochs=1"], -1, 1),
        (["--max_steps", "7"], 7, 3),
        (["--config", str(CONFIGS / "tiny.yaml"), "--num_train_epochs", "2"], -1, 2),
        (["--config", str(CONFIGS / "janus_pro_1b.yaml")], -1, 1),
        (["--config", str(CONFIGS / "janus_pro_1b.yaml"), "--max_steps", "7"], 7, 1),
    ],
)
def test_the_steps_or_epochs_that_are_named_count(args, steps, epochs):
    _, training = parsed(*args)
    assert (training.max_steps, training.num_train_epochs) == (steps, epochs)


def test_steps_and_epochs_at_once_are_refused(tmp_path, capsys):
    config = tmp_path / "both.yaml"
    config.write_text("max_steps: 5\nnum_train_epochs: 1\n")
    for args in (["--max_steps", "5", "--num_train_epochs", "1"], ["--config", str(config)]):
        with pytest.raises(SystemExit):
            parsed(*args)
        assert "expected one of them" in capsys.readouterr().err


@pytest.mark.parametrize("config", ["janus_pro_1b", "janus_pro_7b"])
@pytest.mark.parametrize("pictures", [300, 3_000, 300_000])
def test_the_schedules_of_the_configs_reach_their_learning_rate(config, pictures):
    _, training = parsed("--config", str(CONFIGS / f"{config}.yaml"))
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    steps = math.ceil(2 * pictures / batch)  # drawn, and described
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=training.learning_rate)
    schedule = get_scheduler(training.lr_scheduler_type, optimizer, training.get_warmup_steps(steps), steps)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert max(rates) == pytest.approx(training.learning_rate, rel=1e-3)


def test_a_warm_up_longer_than_the_run_is_refused(base_folder, captioned, tmp_path):
    with pytest.raises(TrainingError, match=r"--warmup_steps 40 in a run of 4 step\(s\).*never reach its peak.*share below 1"):
        train(base_folder, tmp_path / "out", dataset=[str(captioned)], training={"warmup_steps": 40})
    epochs = {"max_steps": None, "num_train_epochs": 1, "warmup_steps": 12}  # of 24 rows, two a step
    with pytest.raises(TrainingError, match=r"--warmup_steps 12 in a run of 12 step\(s\)"):
        train(base_folder, tmp_path / "epochs", dataset=[str(captioned)], stage_1_steps=20, training=epochs)
    assert not list(tmp_path.glob("**/*.safetensors"))


def test_a_run_of_one_step_learns(base_folder, captioned, tmp_path):
    folder = train(base_folder, tmp_path / "out", dataset=[str(captioned)], stage_1_steps=1, training={"max_steps": 1})
    first, second = weights(folder / "stage1"), weights(folder)
    assert any(not torch.equal(first[name], second[name]) for name in first)


# Help


def test_the_help_shows_this_recipes_options_with_their_real_defaults_in_two_screens(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    told = capsys.readouterr().out
    assert len(told.splitlines()) <= 2 * 36
    for name in (name for names in GROUPS.values() for name in names):
        assert f"  --{name} " in told
    defaults = FinetuneArguments(), TrainingConfig(use_cpu=True)
    for name in ("learning_rate", "warmup_steps", "per_device_train_batch_size", "output_dir", "stage_1_steps", "base"):
        value = next(getattr(one, name) for one in defaults if hasattr(one, name))
        [line] = [line for line in told.splitlines() if line.startswith(f"  --{name} ")]
        assert line.endswith(f"[{value}]")
    assert "SFTConfig" in told.splitlines()[-2] + told.splitlines()[-1]
    assert set(vars(defaults[0])) <= {name for names in GROUPS.values() for name in names}


# An adapter that exists


@pytest.fixture(scope="module")
def trained(base_folder, captioned, tmp_path_factory):
    """What a run leaves behind; no test may change it."""
    return train(base_folder, tmp_path_factory.mktemp("trained") / "out", dataset=[str(captioned)], training=AT_END)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"r": 8}, r"r: it has 2, asked for 8"),
        ({"stride": 4}, r"stride: it has 2, asked for 4"),
        ({"stride": [4, 2]}, r"stride: it has 2, asked for \[2, 4\]"),
        ({"codes_per_step": [8]}, r"codes_per_step: it has None, asked for 8"),
        (
            {"decompressor": "phase", "lora_alpha": 3},
            r"decompressor: it has 'strip', asked for 'phase'; lora_alpha: it has 64, asked for 3",
        ),
        ({"target_modules": ["q_proj"]}, r"target_modules: .* asked for"),
    ],
)
def test_options_that_an_adapter_has_otherwise_are_refused_with_the_difference(
    base_folder, captioned, trained, tmp_path, asked, told
):
    with pytest.raises(SystemExit, match=rf"(?s)is an adapter of other settings .*{told}.*without --adapter"):
        train(base_folder, tmp_path / "out", dataset=[str(captioned)], adapter=str(trained), **asked)
    assert not (tmp_path / "out").exists()


def test_options_that_it_has_alike_are_not_and_those_not_named_are_its_own(base_folder, captioned, trained, tmp_path, capsys):
    own = dict.fromkeys(NEW_ADAPTER) | {"r": 2, "stride": [2]}
    folder = train(
        base_folder, tmp_path / "out", dataset=[str(captioned)], adapter=str(trained), training={"max_steps": 1}, **own
    )
    assert weights(folder).keys() == weights(trained).keys()
    assert f"stage 1: done before, in {trained}" in capsys.readouterr().out


@pytest.mark.parametrize(("seed", "place", "said"), [(42, ".", True), (42, "checkpoint-4", True), (7, ".", False)])
def test_going_on_with_the_batches_of_the_last_run_is_said(
    base_folder, captioned, trained, tmp_path, capsys, seed, place, said
):
    adapter, options = str(trained / place), {"max_steps": 1, "seed": seed}
    train(base_folder, tmp_path / "out", dataset=[str(captioned)], adapter=adapter, training=options)
    assert (f"The same captions are dropped as in the run of {adapter}, and" in capsys.readouterr().out) == said


def test_rows_of_a_dataset_train_several_ratios(base_folder, captioned, tmp_path):
    options = {"codes_per_step": [2, 8], "stride": [1, 2], "drawing_global_tokens": True, "training": {"max_steps": 2}}
    folder = train(base_folder, tmp_path / "out", dataset=[str(captioned)], distill=True, **options)
    config = UniCompressConfig.from_pretrained(folder)
    assert (config.codes_per_step, config.stride) == ([2, 8], [1, 2])
    state = weights(folder)
    assert any(name.endswith("decompressor.input_lengths") and value.any() for name, value in state.items())


def test_a_run_is_not_resumed_with_other_ratios(base_folder, captioned, trained):
    with pytest.raises(SystemExit, match=r"codes_per_step: it has None, asked for \[2, 8\]"):
        train(base_folder, trained, dataset=[str(captioned)], resume=True, codes_per_step=[2, 8])


def test_another_learning_rate_goes_on_from_a_checkpoint(base_folder, captioned, trained, tmp_path):
    other = {"learning_rate": 5e-4}
    with pytest.raises(TrainingError, match=rf"learning_rate: 0\.001 then, 0\.0005 now.*--adapter {trained}/checkpoint-4"):
        train(base_folder, trained, dataset=[str(captioned)], resume=True, training=other)
    checkpoint = str(trained / "checkpoint-4")
    folder = train(
        base_folder, tmp_path / "on", dataset=[str(captioned)], adapter=checkpoint, training={**other, "max_steps": 1}
    )
    assert all(value.isfinite().all() for value in weights(folder).values())


# Rows to evaluate on


@pytest.mark.parametrize(("metric", "greater"), [(None, False), ("eval_loss_text", False), ("eval_mean_token_accuracy", True)])
def test_the_best_checkpoint_goes_with_the_saved_ones_and_a_loss_is_best_where_it_is_least(metric, greater):
    _, training = parsed("--load_best_model_at_end", "true", *(["--metric_for_best_model", metric] if metric else []))
    assert (training.eval_strategy, training.eval_steps) == (training.save_strategy, training.save_steps)
    assert training.greater_is_better is greater


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, captioned):
    """Captions under a name of their own, beside an index."""
    file = tmp_path_factory.mktemp("mixed") / "rows.jsonl"
    lines = [json.loads(line) for line in (captioned / "metadata.jsonl").read_text().splitlines()]
    rows = [{"photo": str(captioned / row["file_name"]), "caption": row["text"], "id": i} for i, row in enumerate(lines)]
    return write_rows(file, rows)


def test_a_share_of_the_rows_is_evaluated_on_and_the_best_checkpoint_is_kept(base_folder, mixed, tmp_path):
    folder = train(
        base_folder,
        tmp_path / "out",
        dataset=[mixed],
        columns=["image=photo", "text=caption"],
        eval_share=0.25,
        early_stopping=2,
        stage_1_steps=1,
        training={"learning_rate": 1.0, "max_steps": 8, "save_total_limit": 2, **EVERY_STEP},  # far too much: it gets worse
    )
    log = log_of(folder)
    evaluations = [row for row in log if "eval_loss" in row]
    assert all({"eval_loss_text", "eval_loss_codes", "eval_mean_token_accuracy"} <= row.keys() for row in evaluations)
    assert not any(name.startswith("eval_") for row in log if "loss" in row for name in row)
    losses = [row["eval_loss"] for row in evaluations]
    best = losses.index(min(losses)) + 1
    assert len(losses) == best + 2 < 8  # it stops two evaluations behind the best
    kept = sorted(path.name for path in folder.glob("checkpoint-*"))
    assert f"checkpoint-{best}" in kept
    assert len(kept) == 2
    best_weights = weights(folder / f"checkpoint-{best}")
    assert all(torch.equal(value, best_weights[name]) for name, value in weights(folder).items())


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ([], "captions are dropped as in the run of .*, and the rows come in its order.*go on with other batches"),
        (["--data_seed", "3"], r"captions are dropped as in the run of \S+, since"),
        (["--seed", "3"], None),
        (["--split", "test"], None),
        (["--max_steps", "9"], "captions are dropped"),
    ],
)
def test_a_run_that_goes_on_says_if_it_drops_the_same_captions(tmp_path, capsys, changed, told):
    def begin(folder: str, *options: str) -> None:
        args, training = parsed("--dataset", "rows", "--max_steps", "4", *options)
        begin_run(tmp_path / folder, args.settings, training, False, [])

    begin("first")
    begin("second", "--adapter", str(tmp_path / "first"), *changed)
    said = capsys.readouterr().out
    assert said == "" if told is None else re.search(told, said)


def test_a_run_that_goes_on_with_more_scenes_or_on_a_stream(tmp_path, capsys):
    """Their number decides where scenes come; a stream has one order, whatever the seed."""
    for folder, *options in (("scenes", "--max_steps", "4"), ("stream", "--dataset", "rows", "--streaming", "true")):
        for run in ("first", "second"):
            before = ["--adapter", str(tmp_path / folder / "first")] if run == "second" else []
            longer = ["--max_steps", "9"] if run == "second" or folder == "stream" else []
            args, training = parsed(*options, *before, *longer)
            begin_run(tmp_path / folder / run, args.settings, training, False, [])
    said = capsys.readouterr().out
    assert str(tmp_path / "scenes") not in said
    assert "the rows come in its order" in said
    assert "drop others" in said


@pytest.mark.parametrize("distill", [False, True])
def test_rows_of_their_own_are_evaluated_on_by_their_labels(base_folder, captioned, mixed, tmp_path, distill):
    """No caption is dropped and no teacher asked: what comes out is what the finished adapter scores."""
    options = {"columns": ["image=photo", "text=caption"], "dataset": [mixed], "eval_dataset": [mixed], "distill": distill}
    training = {"max_steps": 1, "per_device_eval_batch_size": 32, **AT_END}
    folder = train(base_folder, tmp_path / "out", caption_dropout=0.9, stage_1_steps=1, training=training, **options)
    [scores] = [row for row in log_of(folder) if "eval_loss" in row]
    again = train(
        base_folder,
        tmp_path / "again",
        adapter=str(folder),
        training={**training, "learning_rate": 0.0},
        **{**options, "distill": False},
        **dict.fromkeys(("num_global_tokens", "r", "decompressor_width", "decompressor_layers")),
    )
    [found] = [row for row in log_of(again) if "eval_loss" in row]
    for name in ("eval_loss", "eval_loss_text", "eval_loss_codes"):
        assert found[name] == pytest.approx(scores[name], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"eval_share": 0.01}, r"--eval_share 0\.01 of 12 row\(s\) leaves 0 to evaluate on and 12 to train on"),
        ({"eval_share": 1.0}, r"--eval_share 1 of 12 row\(s\) leaves 12 to evaluate on and 0 to train on"),
        ({"eval_share": 0.1, "eval_split": "test"}, r"--eval_share 0\.1 with --eval_dataset or --eval_split; expected one"),
        ({"eval_split": "validation"}, r"no split 'validation'; it has train"),
        ({"eval_dataset": ["nowhere.jsonl"]}, r"nowhere\.jsonl cannot be loaded"),
        ({"early_stopping": 1}, r"without rows to evaluate on; expected --eval_dataset, --eval_split or --eval_share"),
        ({"eval_share": 0.1, "streaming": True}, r"--streaming with --eval_share"),
        ({"eval_share": 0.1, "dataset": None}, r"without --dataset; expected one"),
        ({"columns": ["caption"]}, r"--columns caption: expected"),
        ({"columns": ["text=words"]}, r"has no column words"),
        ({"split": "test"}, r"no split 'test'; it has train"),
    ],
)
def test_rows_that_cannot_be_had_are_refused(base_folder, captioned, tmp_path, options, told):
    with pytest.raises((SystemExit, ValueError), match=told):
        train(base_folder, tmp_path / "out", **{"dataset": [str(captioned)], **options})
    assert not list(tmp_path.glob("out/**/*.safetensors"))


# What the base does not know, and what cannot be pushed


def test_words_that_the_base_does_not_know_are_named(base_folder, tmp_path, capsys):
    rows = [
        {"messages": [turn("user", say(text)), turn("assistant", say("2"))]}
        for text in ("a purple 3", "a red 3", "a purple fox")
    ]
    file, options = write_rows(tmp_path / "rows.jsonl", rows), {"num_global_tokens": 0, "training": {"max_steps": 1}}
    with pytest.raises(TrainingError, match=r"No row has an image"):
        train(base_folder, tmp_path / "out", dataset=[file], **options)
    told = capsys.readouterr().out
    assert f"{file}: 2 row(s) have words that the base reads as its unknown token: purple, fox." in told


@pytest.mark.parametrize(
    ("training", "arguments", "error", "told"),
    [
        (
            {"hub_model_id": "org/tuned", "hub_token": "hf_wrong"},
            {"base_id": "org/tiny"},
            HubError,
            r"could not be pushed.*token",
        ),
        (
            {"hub_model_id": "others/tuned", "hub_token": ANN},
            {"base_id": "org/tiny"},
            HubError,
            r"may not write to 'others'.*ann, org",
        ),
        ({"hub_model_id": "org/tuned", "hub_token": ANN}, {}, BaseModelError, r"expected a Hub id that others can load"),
    ],
)
def test_what_cannot_be_pushed_is_told_before_it_is_trained(
    hub, base_folder, captioned, tmp_path, training, arguments, error, told
):
    with pytest.raises(error, match=rf"(?s){told}"):
        train(base_folder, tmp_path / "out", dataset=[str(captioned)], training={"push_to_hub": True, **training}, **arguments)
    assert not (tmp_path / "out").exists()
    assert not hub.repos
