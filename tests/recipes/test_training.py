"""Stage 2 through the stock SFTTrainer, as recipes/finetune.py runs it."""

import copy
import pickle
from itertools import islice

import pytest
import torch
from datasets import Dataset, IterableDataset
from helpers import DECOMPRESSORS, assert_same, attach, base_weights, draw, drawing_inputs, logits, lora_weights
from tiny_world.scenes_dataset import scenes_dataset
from trl import SFTConfig, SFTTrainer

from uc_adapters import UniCompressCollator, UniCompressModel
from uc_adapters.training import JointTrainer

OPTIONS = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "max_length": None,
    "packing": False,
    "remove_unused_columns": False,
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "logging_steps": 1,
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "no",
    "bf16": False,
    "gradient_checkpointing": False,
}


@pytest.fixture
def make_trainer(tmp_path, short_processor):
    """Makes a trainer for an adapter; checkpoints go to tmp_path."""

    def make(model, steps: int, **options) -> SFTTrainer:
        return SFTTrainer(
            model=model,
            args=SFTConfig(output_dir=str(tmp_path), max_steps=steps, **{**OPTIONS, **options}),
            train_dataset=scenes_dataset(16, 1),
            processing_class=short_processor,
            data_collator=UniCompressCollator(short_processor, model.active_peft_config, caption_dropout=0.0),
        )

    return make


def stage_2(base, **fields) -> UniCompressModel:
    model = attach(base, **fields)
    model.train_only("language model")
    return model


@pytest.mark.parametrize("decompressor", DECOMPRESSORS)
def test_two_steps_change_what_stage_2_trains_and_nothing_else(base, make_trainer, decompressor):
    model = stage_2(base, decompressor=decompressor)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before, base_before = lora_weights(model), base_weights(model)
    make_trainer(model, 2).train()
    after = lora_weights(model)
    assert_same(base_weights(model), base_before)
    assert {name for name in before if not torch.equal(before[name], after[name])} == trainable
    assert not any("extractor" in name for name in trainable)
    assert any("lora_A" in name for name in trainable)


def test_the_trainer_minimises_and_logs_the_joint_loss(base, make_trainer):
    model = stage_2(base)
    trainer, batches = make_trainer(model, 1, per_device_train_batch_size=4), []
    collate, untrained = trainer.data_collator, copy.deepcopy(model)
    trainer.data_collator = lambda rows: batches.append(collate(rows)) or dict(batches[-1])
    trainer.train()
    with torch.no_grad():
        expected = untrained(**batches[0])
        after = model(**batches[0])
    log = trainer.state.log_history[0]
    labels = expected.label_mask.sum()
    assert {"pixel_values", "gen_pixel_values"} <= batches[0].keys()  # read and drawn rows in one batch
    assert log["loss"] == pytest.approx(expected.loss.item(), rel=1e-3)
    assert log["mean_token_accuracy"] == pytest.approx((expected.is_top1.sum() / labels).item(), rel=1e-2)
    assert log["entropy"] == pytest.approx((expected.entropy.sum() / labels).item(), rel=1e-2)
    assert after.loss < expected.loss


def test_one_batch_of_four_trains_as_two_of_two(fresh, make_trainer):
    logs = []
    for size, accumulation in ((4, 1), (2, 2)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = make_trainer(stage_2(fresh()), 1, **options)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    for what in ("loss", "grad_norm"):
        assert logs[0][what] == pytest.approx(logs[1][what], rel=1e-3)


def test_resuming_continues_where_the_checkpoint_stopped(fresh, pristine, make_trainer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    straight = stage_2(fresh())
    make_trainer(straight, 2, **options).train()
    checkpoint = tmp_path / "checkpoint-1"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert (checkpoint / "processor_config.json").is_file()
    resumed = stage_2(fresh())
    trainable = {name for name, parameter in resumed.named_parameters() if parameter.requires_grad}
    trainer = make_trainer(resumed, 2, **options)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 2
    assert {name for name, parameter in resumed.named_parameters() if parameter.requires_grad} == trainable
    assert_same(lora_weights(resumed), lora_weights(straight))
    assert_same(base_weights(resumed), base_weights(pristine))


def test_a_checkpoint_is_an_adapter(base, fresh, make_trainer, tmp_path, short_question, short_processor):
    model = stage_2(base)
    make_trainer(model, 1, save_strategy="steps", save_steps=1).train()
    model.eval()
    loaded = UniCompressModel.from_pretrained(fresh(), tmp_path / "checkpoint-1")
    prompts = drawing_inputs(short_processor, ["a red 3"])
    assert torch.equal(logits(loaded, short_question), logits(model, short_question))
    assert torch.equal(draw(loaded, prompts), draw(model, prompts))


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"bf16": True}])
def test_options_of_the_trainer(base, make_trainer, options):
    model = stage_2(base)
    before = base_weights(model)
    trainer = make_trainer(model, 1, **options)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0
    assert_same(base_weights(model), before)


@pytest.fixture
def make_joint_trainer(tmp_path, short_processor):
    """Makes a JointTrainer that drops half of the captions; checkpoints go to tmp_path."""

    def make(model, rows: Dataset | IterableDataset, steps: int = 1, **options) -> JointTrainer:
        return JointTrainer(
            model,
            SFTConfig(output_dir=str(tmp_path), max_steps=steps, **OPTIONS | options),
            train_dataset=rows,
            processing_class=short_processor,
            data_collator=UniCompressCollator(short_processor, model.active_peft_config, caption_dropout=0.5),
        )

    return make


@pytest.fixture(scope="module")
def drawing_rows() -> Dataset:
    """Four scenes to draw."""
    scenes = scenes_dataset(16, 1)
    return Dataset.from_list([row for row in scenes if row["messages"][-1]["content"][0]["type"] == "image"][:4])


def dropped(processor, trainer: JointTrainer, batches: int) -> list[bool]:
    """Whether the prompts of the first batches of an epoch are dropped."""
    trainer.data_collator.collator.epoch = 0
    pad = processor.tokenizer.pad_token_id
    return [row[2] == pad for batch in islice(trainer.get_train_dataloader(), batches) for row in batch["input_ids"]]


@pytest.mark.parametrize("streaming", [False, True])
def test_repeats_of_a_row_in_an_epoch_lose_their_captions_apart(
    base, make_joint_trainer, short_processor, drawing_rows, streaming
):
    rows, model = drawing_rows.select([0] * 64), stage_2(base)

    def coins(seed: int) -> list[bool]:
        trainer = make_joint_trainer(model, rows.to_iterable_dataset() if streaming else rows, seed=seed)
        return dropped(short_processor, trainer, 32)

    assert 16 < sum(coins(1)) < 48
    assert coins(1) == coins(1)
    assert coins(1) != coins(2)


def test_a_stream_that_is_read_again_loses_other_captions(base, make_joint_trainer, short_processor, drawing_rows):
    coins = dropped(short_processor, make_joint_trainer(stage_2(base), drawing_rows.to_iterable_dataset()), 20)
    passes = [tuple(coins[first : first + 4]) for first in range(0, 40, 4)]
    assert len(set(passes)) > 4


def test_a_stream_resumes_in_its_second_pass(fresh, make_joint_trainer, drawing_rows, tmp_path):
    stream = drawing_rows.to_iterable_dataset()
    options = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    straight, resumed = stage_2(fresh()), stage_2(fresh())
    make_joint_trainer(straight, stream, 5, **options).train()
    make_joint_trainer(resumed, stream, 5, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(lora_weights(resumed), lora_weights(straight))


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_rows_are_grouped_by_a_column_of_their_lengths(base, make_joint_trainer, drawing_rows, strategy):
    rows = drawing_rows.add_column("length", [1, 9, 1, 9])
    trainer = make_joint_trainer(stage_2(base), rows, train_sampling_strategy=strategy)
    assert sum(len(batch["input_ids"]) for batch in trainer.get_train_dataloader()) == 4


@pytest.mark.parametrize("streaming", [False, True])
def test_workers_that_are_spawned_get_the_rows(base, make_joint_trainer, drawing_rows, streaming):
    trainer = make_joint_trainer(stage_2(base), drawing_rows.to_iterable_dataset() if streaming else drawing_rows)
    assert pickle.loads(pickle.dumps(trainer.get_train_dataloader().dataset)) is not None


def test_a_bfloat16_base_trains_float32_adapters(base, make_trainer):
    model = stage_2(base.to(torch.bfloat16))
    before = lora_weights(model)
    make_trainer(model, 1).train()
    after = lora_weights(model)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_evaluation_scores_the_joint_loss(base, make_trainer):
    metrics = make_trainer(attach(base), 1).evaluate(scenes_dataset(4, 9, "held-out"))
    assert metrics["eval_loss"] > 0


def test_each_set_of_rows_to_evaluate_on_has_losses_of_its_own(base, make_joint_trainer, drawing_rows):
    trainer = make_joint_trainer(stage_2(base), drawing_rows)
    one, both = drawing_rows.select([0]), drawing_rows.select([0, 1])
    alone = {name: trainer.evaluate(rows)["eval_loss_codes"] for name, rows in {"one": one, "both": both}.items()}
    found = trainer.evaluate({"one": one, "both": both})
    assert {name: found[f"eval_{name}_loss_codes"] for name in alone} == alone
    assert alone["one"] != alone["both"]


def test_a_second_adapter_trains_while_the_first_stays(base, make_trainer):
    model = attach(base)
    model.add_adapter("second", model.peft_config["default"].__class__(r=2, decompressor_width=64, decompressor_layers=1))
    model.set_adapter("second")
    model.train_only("language model")
    before, first = lora_weights(model, "second"), lora_weights(model)
    make_trainer(model, 1).train()
    assert_same(lora_weights(model), first)
    assert any(not torch.equal(value, before[name]) for name, value in lora_weights(model, "second").items())
