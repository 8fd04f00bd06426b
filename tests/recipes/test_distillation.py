"""finetune.py --distill: the dense base answers, draws, and its words are learned as it weighs them."""

import io
import json

import numpy as np
import pytest
import torch
from conversations import UNFINISHED_FORMS, DatasetError, conversations
from distillation import DistillingTrainer, filled_in
from finetuning import TRAINING, train, write_captioned
from helpers import assert_same, attach, base_weights, drawing_inputs, question_inputs
from PIL import Image
from safetensors.torch import load_file
from scenes_dataset import scenes_dataset
from trl import SFTConfig

from uc_adapters import UniCompressCollator

QUESTION = "How many digits are there?"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_captioned(tmp_path_factory.mktemp("data") / "captioned", 4)


@pytest.fixture
def asked(pictures, tmp_path):
    """Questions without answers."""
    file = tmp_path / "asked.jsonl"
    file.write_text("\n".join(json.dumps({"image": str(pictures / f"{i}.png"), "question": QUESTION}) for i in range(4)))
    return file


@pytest.fixture
def prompts(tmp_path):
    """Prompts without images."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"a red {digit}"}) for digit in range(4)))
    return file


@pytest.fixture
def distiller(base, processor, short_processor, tmp_path):
    model = attach(base)
    training = SFTConfig(
        output_dir=str(tmp_path),
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        **{**TRAINING, "save_strategy": "no", "max_steps": 2},
    )
    return DistillingTrainer(
        model=model,
        args=training,
        train_dataset=scenes_dataset(8, 1),
        processing_class=short_processor,
        teacher_processor=processor,
        data_collator=UniCompressCollator(short_processor, model.active_peft_config, caption_dropout=0.0),
    )


def test_the_base_answers_what_has_no_answer(base, pristine, processor, asked, images):
    rows = filled_in(conversations(str(asked), forms=UNFINISHED_FORMS), attach(base), processor)
    for row in rows:
        question, answer = row["messages"]
        image = Image.open(row["images"][0]["path"])
        inputs = question_inputs(processor, [QUESTION], [image])
        output = pristine.generate(**inputs, max_new_tokens=64, do_sample=False)
        told = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert question["role"] == "user"
        assert answer == {"role": "assistant", "content": [{"type": "text", "text": told}]}


def test_the_base_draws_what_has_no_image(base, pristine, processor, prompts):
    rows = filled_in(conversations(str(prompts), forms=UNFINISHED_FORMS), attach(base), processor, seed=3)
    torch.manual_seed(3 * 1_000_003 + 1)
    tokens = pristine.generate(**drawing_inputs(processor, ["a red 1"]), generation_mode="image", do_sample=True)
    pixels = pristine.decode_image_tokens(tokens).permute(0, 3, 1, 2)
    [expected] = processor.postprocess(list(pixels), return_tensors="PIL.Image.Image")["pixel_values"]
    drawn = Image.open(io.BytesIO(rows[1]["images"][0]["bytes"]))
    assert np.array_equal(np.asarray(drawn), np.asarray(expected))


def test_what_is_complete_is_left_alone_and_nothing_is_asked_twice(base, processor, pictures, asked):
    model, calls = attach(base), []
    base.model.language_model.register_forward_hook(lambda *_: calls.append(1))
    whole = conversations(str(pictures))
    assert filled_in(whole, model, processor)[:] == whole[:]
    assert not calls
    first = filled_in(conversations(str(asked), forms=UNFINISHED_FORMS), model, processor)
    count = len(calls)
    again = filled_in(conversations(str(asked), forms=UNFINISHED_FORMS), model, processor)
    assert first[:] == again[:]
    assert len(calls) == count > 0


def test_what_lacks_its_half_is_refused_where_nobody_fills_it_in(asked, prompts):
    for file in (asked, prompts):
        with pytest.raises(DatasetError, match=r"has the columns .*expected one of"):
            conversations(str(file))


def test_words_are_learned_from_the_teachers_distribution(distiller, pristine):
    rows = [scenes_dataset(8, 1)[row] for row in range(4)]  # read, drawn, read, drawn
    batch = distiller.data_collator(rows)
    teacher, teaches = batch.pop("teacher"), batch.pop("teaches")
    batch.pop("origins")
    assert teaches.tolist() == [True, False, True, False]
    with torch.no_grad():
        logits = pristine(**{name: value for name, value in teacher.items() if name != "labels"}).logits[:, :-1]
        taught = logits[teacher["labels"][:, 1:] != -100].softmax(-1)
    probs = distiller._word_probs(teacher, teaches, batch)
    words = (batch["labels"][:, 1:] != -100) & ~batch["drawn_mask"][:, 1:]
    of_teacher = teaches[:, None].expand_as(words)[words]
    torch.testing.assert_close(probs[of_teacher], taught)
    labels = batch["labels"][:, 1:][words]
    assert torch.equal(probs[~of_teacher].argmax(-1), labels[~of_teacher])
    assert (probs[~of_teacher].sum(-1) == 1).all()
    plain, distilled = distiller.model(**batch), distiller.model(**batch, word_probs=probs)
    drawn = batch["drawn_mask"][:, 1:]
    assert torch.equal(distilled.log_probs[drawn], plain.log_probs[drawn])
    others = words & ~teaches[:, None]
    torch.testing.assert_close(distilled.log_probs[others], plain.log_probs[others])
    assert (distilled.log_probs[words & teaches[:, None]] <= 1e-6).all()  # less a divergence


def test_training_changes_what_stage_2_trains_and_nothing_else(distiller, pristine):
    model = distiller.model
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    distiller.train()
    assert_same(base_weights(model), base_weights(pristine))
    after = dict(model.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == trainable
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == trainable


def test_finetune_distils_from_questions_and_prompts_alone(base_folder, asked, prompts, tmp_path):
    folder = train(base_folder, tmp_path / "out", dataset=[str(asked), str(prompts)], distill=True)
    assert all(weight.isfinite().all() for weight in load_file(folder / "adapter_model.safetensors").values())
    assert "--distill" in (folder / "README.md").read_text()
