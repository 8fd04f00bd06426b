"""finetune.py from end to end: both stages, resuming, and what can go wrong on the way."""

import copy
import json
import math
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from finetune_runs import AT_END, EVERY_STEP, TRAINING, log_of, train, train_until_killed, write_captioned
from finetuning import stages
from helpers import ANN, DECOMPRESSORS, assert_same, attach, base_weights
from huggingface_hub import ModelCard
from other_processes import exit_code
from PIL import Image
from rows.latent_cache import with_latents
from rows.training_rows import RowCheck, training_rows
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from uc_adapters import UniCompressCollator, UniCompressModel
from uc_adapters.training.resumable import TrainingError, last_checkpoint


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """An imagefolder."""
    return write_captioned(tmp_path_factory.mktemp("data") / "captioned")


@pytest.fixture(scope="module")
def whole(base_folder, captioned, tmp_path_factory):
    """What a run leaves behind that nothing cut off; no test may change it."""
    return train(base_folder, tmp_path_factory.mktemp("whole") / "out", dataset=[str(captioned)], training=EVERY_STEP)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("decompressor", DECOMPRESSORS)
def test_both_stages_make_an_adapter_that_loads(base_folder, captioned, tmp_path, pristine, decompressor, monkeypatch):
    monkeypatch.setattr(stages, "ENOUGH_PERPLEXITY", 0.0)  # so few steps would not pass the guard against collapsed codes
    options = {"decompressor": decompressor, "stage_1_steps": 2, "training": {"max_steps": 2}}
    folder = train(base_folder, tmp_path / "out", dataset=[str(captioned)], **options)
    for adapter in (folder / "stage1", folder):
        model = UniCompressModel.from_pretrained(adapter, base_model=base_folder)
        assert_same(base_weights(model), base_weights(pristine))
        assert AutoProcessor.from_pretrained(adapter).num_image_tokens == model.num_image_tokens == 1 + 1 + 16
    first, second = weights(folder / "stage1"), weights(folder)
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert not any("extractor" in name for name in changed)
    assert any("lora_B" in name for name in changed)


def test_where_stage_1_has_nothing_to_learn_it_is_skipped(base_folder, captioned, tmp_path):
    """Without global tokens, and with a decoder that learns from the language model's states."""
    arguments = {"dataset": [str(captioned)], "num_global_tokens": 0, "decompressor": "strip"}
    folder = train(base_folder, tmp_path / "out", training={"max_steps": 1, **AT_END}, **arguments)
    assert last_checkpoint(folder).name == "checkpoint-1"
    assert last_checkpoint(folder / "stage1") is None
    assert weights(folder).keys() == weights(folder / "stage1").keys()
    assert UniCompressModel.from_pretrained(folder, base_model=base_folder).num_image_tokens == 1 + 16


def test_the_losses_of_its_parts_are_logged_apart(base_folder, captioned, tmp_path):
    options = {"training": {"report_to": ["tensorboard"], **AT_END}, "decompressor": "phase", "num_global_tokens": 0}
    folder = train(base_folder, tmp_path / "out", dataset=[str(captioned)], **options)
    parts = {"reconstruction", "codebook", "code_accuracy"}
    assert all(parts <= row.keys() for row in log_of(folder / "stage1") if "loss" in row)
    seen = {name for row in log_of(folder) for name in row}
    assert {"loss", "loss_text", "loss_codes", "mean_token_accuracy"} <= seen
    written = b"".join(file.read_bytes() for file in folder.rglob("events.out.tfevents.*"))
    assert b"train/loss_codes" in written
    assert b"train/reconstruction" in written


@pytest.fixture
def few_shown(monkeypatch):
    """Each is drawn apart."""
    monkeypatch.setattr(stages, "SHOWN", 2)


@pytest.mark.usefixtures("few_shown")
def test_sample_pictures_are_drawn_and_change_nothing(base_folder, captioned, tmp_path):
    options = {"decompressor": "phase", "num_global_tokens": 0, "stage_1_steps": 2}  # it is drawn with in both stages
    options |= {"dataset": [str(captioned)], "training": {"max_steps": 2}}
    plain = train(base_folder, tmp_path / "plain", **options)
    shown = train(base_folder, tmp_path / "shown", sample_steps=1, **options)
    assert_same(weights(shown), weights(plain))
    for folder in (shown / "stage1", shown):
        pictures = sorted((folder / "samples").iterdir())
        assert [picture.name for picture in pictures] == ["step-000001.png", "step-000002.png"]
        assert min(Image.open(pictures[0]).size) > 200


@pytest.mark.usefixtures("few_shown")
def test_sample_pictures_are_drawn_as_after_training(base_folder, captioned, tmp_path):
    pictures, options = [], {"dataset": [str(captioned)], "num_global_tokens": 0}  # stage 1 has nothing to learn
    for checkpointing in (False, True):  # in training mode, checkpointing would draw without a cache
        training = {"max_steps": 1, "learning_rate": 0.0, "gradient_checkpointing": checkpointing}
        out = tmp_path / f"out-{checkpointing}"
        folder = train(base_folder, out, sample_steps=1, training=training, **options)
        pictures.append((folder / "samples" / "step-000001.png").read_bytes())
    assert pictures[0] == pictures[1]


def test_a_run_killed_in_each_stage_resumes_to_the_same_weights(base_folder, captioned, whole, tmp_path):
    told = {"base": str(base_folder), "output_dir": str(tmp_path / "cut"), "dataset": [str(captioned)], "training": EVERY_STEP}
    assert exit_code(train_until_killed, 1, 2, told) == -signal.SIGKILL
    assert exit_code(train_until_killed, 2, 3, {**told, "resume": True}) == -signal.SIGKILL
    train(**told, resume=True)
    assert_same(weights(tmp_path / "cut" / "stage1"), weights(whole / "stage1"))
    assert_same(weights(tmp_path / "cut"), weights(whole))


def test_half_a_checkpoint_is_not_resumed_from(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "out")
    assert last_checkpoint(folder).name == "checkpoint-4"
    state = folder / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    assert last_checkpoint(folder).name == "checkpoint-3"
    for step in (1, 2, 3):
        (folder / f"checkpoint-{step}" / "trainer_state.json").unlink()
    assert last_checkpoint(folder) is None


def test_resuming_with_other_settings_is_refused(base_folder, captioned, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "out")
    with pytest.raises(TrainingError, match=r"learning_rate: 0\.001 then, 0\.01 now"):
        train(base_folder, folder, dataset=[str(captioned)], resume=True, training={"learning_rate": 0.01})
    with pytest.raises(TrainingError, match=r"earlier run.*--resume true.*another --output_dir"):
        train(base_folder, folder, dataset=[str(captioned)])
    with pytest.raises(TrainingError, match=r"no run began in .*nowhere"):
        train(base_folder, tmp_path / "nowhere", dataset=[str(captioned)], resume=True)


def test_each_stage_can_be_run_alone(base_folder, captioned, whole, tmp_path):
    apart = train(base_folder, tmp_path / "apart", dataset=[str(captioned)], stage=1)
    assert not (apart / "adapter_config.json").exists()
    train(base_folder, apart, dataset=[str(captioned)], stage=2)
    assert_same(weights(apart), weights(whole))
    with pytest.raises(SystemExit, match=r"--stage 3.*expected 1, 2"):
        train(base_folder, apart, stage=3)
    with pytest.raises(SystemExit, match=r"--stage 1 with --adapter .*expected one of them"):
        train(base_folder, tmp_path / "neither", stage=1, adapter=str(whole / "stage1"))


class Spoil(TrainerCallback):
    """Makes a weight a NaN before the third step."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            with torch.no_grad():
                next(weight for weight in model.parameters() if weight.requires_grad).fill_(math.nan)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_loss_that_is_no_number_stops_and_names_step_and_rows(base_folder, captioned, tmp_path, monkeypatch, stage):
    name = ("ReconstructionTrainer", "JointTrainer")[stage - 1]
    trainer = getattr(stages, name)

    def spoiled(*args, **kwargs):
        made = trainer(*args, **kwargs)
        made.add_callback(Spoil())
        return made

    monkeypatch.setattr(stages, name, spoiled)
    options = {"stage_1_steps": (4, 1)[stage - 1], "training": EVERY_STEP}
    with pytest.raises(TrainingError, match=r"step 3 is nan.*captioned, row \d+ \(\d+\.png\).*checkpoint-2"):
        train(base_folder, tmp_path / "out", dataset=[str(captioned)], **options)
    folder = tmp_path / "out" / "stage1" if stage == 1 else tmp_path / "out"
    assert last_checkpoint(folder).name == "checkpoint-2"


def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_half_written(base_folder, captioned, whole, tmp_path):
    shutil.copytree(whole / "stage1", tmp_path / "out" / "stage1")
    options = {"dataset": [str(captioned)], "stage": 2, "training": EVERY_STEP}
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)

    class FillDisk(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    trainer, out = stages.JointTrainer, tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "JointTrainer", lambda *args, **kwargs: with_callback(trainer(*args, **kwargs), FillDisk()))
        try:
            with pytest.raises(TrainingError, match=r"step 3 could not be written.*checkpoint-2.*--resume true"):
                train(base_folder, out, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    train(base_folder, out, resume=True, **options)
    assert_same(weights(out), weights(whole))


def with_callback(trainer, callback):
    trainer.add_callback(callback)
    return trainer


def test_latents_are_computed_once(base, captioned, short_processor, tmp_path):
    model, encoded = attach(base), []
    base.model.vqmodel.encoder.register_forward_hook(lambda module, args, output: encoded.append(len(output)))
    collator = UniCompressCollator(short_processor, model.active_peft_config)
    rows = training_rows([str(captioned)], RowCheck(collator, 1024))
    first = with_latents(rows, model, short_processor)
    assert sum(encoded) == 12  # each image once: drawn and described are rows of one image
    again = with_latents(rows, model, short_processor)
    assert sum(encoded) == 12
    assert again["latents"][:] == first["latents"][:]
    assert [latents[0] is not None for latents in first["latents"]] == first["first"][:]  # what is described is only read
    with torch.no_grad():
        base.model.vqmodel.quant_conv.weight.mul_(-1)
        base.model.vqmodel.quantize.embedding.weight.mul_(-1)
    other = attach(AutoModelForImageTextToText.from_config(base.config))  # another base: other latents
    assert with_latents(rows, other, short_processor)["latents"][0] != first["latents"][0]


def test_latents_cut_off_leave_no_half_cache(base, captioned, short_processor):
    model, processor = attach(base, stride=4), copy.deepcopy(short_processor)
    processor.image_processor.image_mean = [0.4] * 3  # for a cache of its own
    collator = UniCompressCollator(model.compact_processor(processor), model.active_peft_config)
    rows = training_rows([str(captioned)], RowCheck(collator, 1024))

    def stop(module, args, output):
        raise KeyboardInterrupt

    hook = base.model.vqmodel.encoder.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        with_latents(rows, model, processor)
    hook.remove()
    latents = with_latents(rows, model, processor)["latents"]
    assert [of_row[0] is not None for of_row in latents] == rows["first"][:]


def test_several_datasets_are_mixed_and_streamed(base_folder, captioned, tmp_path):
    asked = tmp_path / "asked.jsonl"
    rows = [{"image": str(captioned / f"{i}.png"), "question": "How many digits are there?", "answer": 2} for i in range(4)]
    asked.write_text("\n".join(map(json.dumps, rows)))
    sources, short = [str(captioned), str(asked)], {"stage_1_steps": 1, "training": {"max_steps": 2}}
    folder = train(base_folder, tmp_path / "mixed", dataset=sources, dataset_weights=[1.0, 3.0], **short)
    assert weights(folder)
    folder = train(base_folder, tmp_path / "streamed", dataset=sources, streaming=True, **short)
    assert weights(folder)
    with pytest.raises(SystemExit, match=r"--streaming with --max_steps -1.*expected a number"):
        train(base_folder, tmp_path / "endless", dataset=sources, streaming=True, training={"max_steps": -1})
    with pytest.raises(SystemExit, match=r"--streaming with --distill.*expected one of them"):
        train(base_folder, tmp_path / "taught", dataset=sources, streaming=True, distill=True, training={"max_steps": 2})


def test_options_for_small_hardware_train_in_both_stages(base_folder, captioned, tmp_path):
    """All at once; test_training.py has them one by one."""
    options = {"bf16": True, "gradient_accumulation_steps": 2, "gradient_checkpointing": True, "max_steps": 2}
    arguments = {"dataset": [str(captioned)], "dtype": "bfloat16", "stage_1_steps": 2}
    folder = train(base_folder, tmp_path / "out", training=options, **arguments)
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in weights(folder).values())


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantised_base_trains(base_folder, captioned, tmp_path, bits):
    training = {"max_steps": 2, "learning_rate": 1e-4}
    folder = train(base_folder, tmp_path / "out", dataset=[str(captioned)], quantize=bits, stage_1_steps=1, training=training)
    before, after = weights(folder / "stage1"), weights(folder)
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in after.values())
    (norm,) = [name for name in after if name.endswith("decoder.norm.weight")]
    assert (before[norm] != after[norm]).float().mean() > 0.9  # in bfloat16 such steps would leave each of these at 1
    with pytest.raises(SystemExit, match=r"'3bit'.*8bit or 4bit"):
        train(base_folder, tmp_path / "no", quantize="3bit")


def test_the_finished_adapter_is_pushed_with_its_card(hub, base_folder, tmp_path):
    train(
        base_folder,
        tmp_path / "out",
        base_id="org/tiny",
        training={"max_steps": 1, "push_to_hub": True, "hub_model_id": "org/tuned", "hub_token": ANN},
    )
    files = hub.repos["org/tuned"].files()
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "org/tiny"
    assert "| steps | 1 |" in card.text
    assert "| stage 1 | 4 steps of 4" in card.text
    assert "training_args.bin" not in files
    assert not any("checkpoint" in name or "stage1" in name for name in files)


def test_collapsed_global_tokens_are_not_saved(base_folder, tmp_path):
    folder = tmp_path / "red"
    folder.mkdir()
    for index in range(8):
        Image.new("RGB", (64, 64), "red").save(folder / f"{index}.png")  # one picture, hence one code
    lines = [json.dumps({"file_name": f"{index}.png", "text": "a red 3"}) for index in range(8)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(TrainingError, match=r"collapsed.*1\.00.*expected 2"):
        train(base_folder, tmp_path / "out", dataset=[str(folder)], num_global_tokens=4, decompressor="phase")
    assert not (tmp_path / "out" / "stage1" / "adapter_config.json").exists()


def test_rows_without_images_cannot_begin_with_stage_1(base_folder, tmp_path):
    words = {"messages": [{"role": role, "content": "2"} for role in ("user", "assistant")], "images": []}
    file = tmp_path / "words.jsonl"
    file.write_text("\n".join([json.dumps(words)] * 4))
    with pytest.raises(TrainingError, match=r"No row has an image.*--adapter"):
        train(base_folder, tmp_path / "out", dataset=[str(file)])


def test_settings_of_stage_1_are_its_own(base_folder, captioned, tmp_path):
    training = {"gradient_accumulation_steps": 3, **AT_END}
    folder = train(base_folder, tmp_path / "out", dataset=[str(captioned)], stage=1, stage_1_steps=2, training=training)
    log = [row for row in log_of(folder / "stage1") if "loss" in row]
    assert [row["step"] for row in log] == [1, 2]
    assert log[-1]["epoch"] == pytest.approx(2 * 4 / 12)  # steps of four images, of twelve
    assert TRAINING["max_steps"] == 4


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"dtype": "fp16"}, r"--dtype fp16 is not known; expected one of auto, float32"),
        ({"stage": 2}, r"--stage 2, and .*out/stage1 holds no adapter; expected one: run --stage 1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(tmp_path, given, told):
    with pytest.raises(SystemExit, match=told):
        train(tmp_path / "no-base", tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
