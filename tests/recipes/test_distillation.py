"""finetune.py --distill: the dense base answers, draws, and its words and drawn codes are learned as it weighs them."""

import io
import json
from functools import partial

import numpy as np
import pytest
import torch
from finetune_runs import TRAINING, say, train, turn, write_captioned, write_rows
from finetuning.answers import filled_in
from helpers import assert_same, attach, base_weights, drawing_inputs, question_inputs
from PIL import Image
from rows.conversations import UNFINISHED_FORMS, DatasetError, conversations
from rows.training_rows import RowCheck, places_of, training_rows
from safetensors.torch import load_file
from tiny_world.scenes_dataset import scenes_dataset
from trl import SFTConfig

from uc_adapters import UniCompressCollator, UniCompressModel
from uc_adapters.families import family_of
from uc_adapters.images import Images, pack_latents
from uc_adapters.training.distillation import DistillationTrainer, dense_codes, teacher_collator, teacher_targets

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
def make_distiller(processor, short_processor, tmp_path):
    """Makes a trainer for an adapter that learns from its base."""

    def make(model: UniCompressModel, caption_dropout: float = 0.0) -> DistillationTrainer:
        training = SFTConfig(
            output_dir=str(tmp_path),
            max_length=None,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            **{**TRAINING, "save_strategy": "no", "max_steps": 2},
        )
        return DistillationTrainer(
            model=model,
            args=training,
            train_dataset=scenes_dataset(8, 1),
            processing_class=short_processor,
            teacher_processor=processor,
            data_collator=UniCompressCollator(short_processor, model.active_peft_config, caption_dropout),
        )

    return make


@pytest.fixture
def distiller(base, make_distiller):
    return make_distiller(attach(base))


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
    torch.manual_seed(3 * 1_000_003)
    captions = [f"a red {digit}" for digit in range(4)]
    tokens = pristine.generate(**drawing_inputs(processor, captions), generation_mode="image", do_sample=True)
    pixels = pristine.decode_image_tokens(tokens).permute(0, 3, 1, 2)
    expected = processor.postprocess(list(pixels), return_tensors="PIL.Image.Image")["pixel_values"]
    for row, image in zip(rows, expected, strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(row["images"][0]["bytes"]))), np.asarray(image))


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


def taught_rows(model, processor, short_processor, source: str, context: int = 1024, **options):
    """What `finetune.py --distill` trains on."""
    collator = UniCompressCollator(short_processor, model.active_peft_config)
    check = RowCheck(collator, context, teacher=teacher_collator(collator, processor))
    return training_rows([source], check, fill_in=lambda rows: filled_in(rows, model, processor), **options)


IMAGE = {"type": "image"}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"image": "nowhere.png", "question": QUESTION}, "No such file"),
        ({"image": "words.png", "question": QUESTION}, "PIL cannot read an image"),
        ({"image": None, "question": QUESTION}, "An image is missing"),
        ({"image": "good.png", "question": " "}, r"turn 1 \(user\) has a text that is empty"),
    ],
)
def test_a_bad_question_is_named_and_can_be_left_out(base, processor, short_processor, images, tmp_path, row, problem):
    images[0].save(tmp_path / "good.png")
    (tmp_path / "words.png").write_text("no image")
    model = attach(base)
    source = write_rows(tmp_path / "asked.jsonl", [{"image": "good.png", "question": QUESTION}, row])
    with pytest.raises(DatasetError, match=rf"1 bad row\(s\) .*\n  {source}, row 1.*{problem}"):
        taught_rows(model, processor, short_processor, source)
    assert len(taught_rows(model, processor, short_processor, source, skip_bad_rows=True)) == 1


def test_a_missing_image_to_read_is_not_drawn(base, processor, short_processor, tmp_path):
    """Only a prompt is drawn: words, and an image to draw for them."""
    row = {"messages": [turn("user", IMAGE, say(QUESTION)), turn("assistant", say("3"))], "images": []}
    source = write_rows(tmp_path / "told.jsonl", [row])
    with pytest.raises(DatasetError, match=r"row 0: .*0 image\(s\) for 1 image part\(s\)"):
        taught_rows(attach(base), processor, short_processor, source)


def test_a_question_to_which_the_base_says_nothing_is_named_as_such(base, processor, short_processor, asked):
    end = processor.tokenizer.eos_token_id
    base.lm_head.register_forward_hook(lambda module, args, output: output.index_fill(-1, torch.tensor(end), 1e9))
    with pytest.raises(DatasetError, match=r"4 bad row\(s\).*\n.*row 0.*Nothing to learn.*The base.s own answer is empty"):
        taught_rows(attach(base), processor, short_processor, str(asked))


def test_a_row_that_the_teacher_has_no_room_for_is_refused(base, processor, short_processor, images, tmp_path):
    images[0].save(tmp_path / "0.png")
    messages = [part for _ in range(3) for part in (turn("user", IMAGE, say(QUESTION)), turn("assistant", say("3")))]
    source = write_rows(tmp_path / "told.jsonl", [{"messages": messages, "images": ["0.png"] * 3}])
    model = attach(base)
    length = len(
        teacher_collator(UniCompressCollator(short_processor, model.active_peft_config), processor)(
            [{"messages": messages, "images": images[:1] * 3}]
        )["input_ids"][0]
    )
    assert len(taught_rows(model, processor, short_processor, source, context=length)) == 1
    with pytest.raises(DatasetError, match=rf"{length} tokens for the base as teacher, where the base takes {length - 1}"):
        taught_rows(model, processor, short_processor, source, context=length - 1)


@pytest.mark.parametrize("decompressor", ["strip", "phase"])
def test_a_drawing_takes_the_places_of_the_context_that_it_is_given(base, short_processor, images, tmp_path, decompressor):
    """With "strip" those of the base's own sequence, far more than its tokens."""
    images[0].save(tmp_path / "0.png")
    model = attach(base, decompressor=decompressor)
    collator = UniCompressCollator(short_processor, model.active_peft_config, caption_dropout=0.0)
    messages = [turn("user", say("a red 3")), turn("assistant", IMAGE)]
    batch = collator([{"messages": messages, "images": images[:1]}])
    seen = []
    hook = base.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch)
    hook.remove()
    places = int(seen[0].max()) + 1
    assert places - batch["input_ids"].shape[1] == {"strip": 47, "phase": 0}[decompressor]
    source = write_rows(tmp_path / "drawn.jsonl", [{"messages": messages, "images": ["0.png"]}])
    assert len(training_rows([source], RowCheck(collator, places, partial(places_of, model)))) == 1
    with pytest.raises(DatasetError, match=rf"{places} tokens, where the base takes {places - 1}"):
        training_rows([source], RowCheck(collator, places - 1, partial(places_of, model)))


def test_words_are_learned_from_the_teachers_distribution(distiller, pristine):
    rows = [scenes_dataset(8, 1)[row] | {"taught": row != 2} for row in range(4)]  # read, drawn, read by a label, drawn
    batch = distiller.data_collator(rows)
    teacher = batch.pop("teacher")
    batch.pop("origins")
    expected = []
    for row in rows:
        alone, labels, drawn = by_hand(pristine, distiller, row)
        expected.append(pristine.lm_head(alone[:, :-1])[0, (labels != -100)[0, 1:] & ~drawn[0, 1:]].softmax(-1))
    told = teacher_targets(distiller.model, teacher, 1.0)
    torch.testing.assert_close(told["teacher_probs"], torch.cat(expected), atol=1e-5, rtol=1e-4)
    words = (batch["labels"] != -100) & ~batch["gen_mask"]
    assert len(told["teacher_probs"]) == words.sum()
    with torch.no_grad():
        plain, distilled = distiller.model(**batch), distiller.model(**batch, teacher_probs=told["teacher_probs"])
        mixed = distiller.model(**batch, teacher_probs=told["teacher_probs"], teacher_probs_weight=told["teacher_probs_weight"])
    of_words = words[:, 1:]
    assert torch.equal(distilled.log_probs[~of_words], plain.log_probs[~of_words])
    assert (distilled.log_probs[of_words] <= 1e-6).all()  # less a divergence
    taught = [0, 1, 3]
    torch.testing.assert_close(mixed.log_probs[taught], distilled.log_probs[taught])
    torch.testing.assert_close(mixed.log_probs[2], plain.log_probs[2])  # the dataset's own answers


def by_hand(pristine, distiller, row: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A row's last hidden states of the bare base (1, L, D), which reads and draws all codes; its labels, and what it draws."""
    batch, family = distiller.data_collator.dense([row]), family_of(pristine)
    drawn = batch.get("gen_mask", torch.zeros_like(batch["input_ids"], dtype=torch.bool))
    with torch.no_grad():
        embeddings = pristine.get_input_embeddings()(batch["input_ids"])
        if "pixel_values" in batch:
            features = pristine.model.get_image_features(batch["pixel_values"]).pooler_output
            embeddings[(batch["input_ids"] == family.image_token_id) & ~drawn] = features.flatten(0, 1)
        if drawn.any():
            codes = family.dense_codes(batch["gen_pixel_values"])
            embeddings[drawn] = pristine.prepare_embeddings_for_image_generation(codes).flatten(0, 1)
        hidden = pristine.model.language_model(inputs_embeds=embeddings).last_hidden_state
    return hidden, batch["labels"], drawn


@pytest.fixture
def editing(images):
    """A row that reads one image and draws another, behind a drawing of its own."""
    image = {"type": "image"}
    contents = [say("a red 3")], [image], [image, say("a blue 7")], [image], [say("How many digits are there?")], [say("4")]
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": messages, "images": images[:3]}


def test_drawn_states_are_the_bare_bases_before_each_code(distiller, pristine, editing):
    rows = [editing, *(scenes_dataset(8, 1)[row] for row in range(2))]  # drawn twice, read, drawn
    told = teacher_targets(distiller.model, distiller.data_collator(rows)["teacher"], 1.0)
    expected = []
    for row in rows:
        hidden, _, drawn = by_hand(pristine, distiller, row)
        expected.append(hidden[:, :-1][drawn[:, 1:]].view(-1, 64, hidden.shape[-1]))
    torch.testing.assert_close(told["teacher_states"], torch.cat(expected), atol=1e-4, rtol=1e-4)
    assert len(told["teacher_states"]) == 3


def test_a_step_is_the_loss_that_the_teacher_says(distiller, editing):
    batch = distiller.data_collator([editing, scenes_dataset(8, 1)[0] | {"taught": True}])
    batch.pop("origins")
    told = teacher_targets(distiller.model, dict(batch["teacher"]), 1.0)
    assert told.keys() == {"teacher_probs", "teacher_probs_weight", "teacher_states", "teacher_states_weight"}
    inputs = {name: value for name, value in batch.items() if name != "teacher"}
    with torch.no_grad():
        expected = distiller.model(**inputs, **told).loss
        assert torch.equal(distiller.compute_loss(distiller.model, batch), expected)


def test_rows_that_read_teach_no_states_and_other_orders_none(base, make_distiller):
    reading, drawing = (scenes_dataset(8, 1)[row] for row in range(2))
    strip = make_distiller(attach(base))
    assert teacher_targets(strip.model, strip.data_collator([reading])["teacher"], 1.0) == {}  # nobody is asked
    assert teacher_targets(strip.model, strip.data_collator([reading | {"taught": True}])["teacher"], 1.0).keys() == {
        *("teacher_probs", "teacher_probs_weight")
    }
    phase = make_distiller(attach(strip.model.unload(), decompressor="phase"))
    assert "teacher_states" not in teacher_targets(phase.model, phase.data_collator([reading, drawing])["teacher"], 1.0)


def test_a_teacher_of_latents_says_what_it_says_of_pixels(distiller, editing, short_processor):
    family, collator = distiller.model.family, distiller.data_collator
    packed = {**editing, "latents": pack_latents(family, short_processor, editing["images"])}
    pixels, latents = (collator([row])["teacher"] for row in (editing, packed))
    drawn = Images(pixels["gen_pixel_values"]), Images(latents=latents["gen_latents"])
    own = family.dense_codes(pixels["gen_pixel_values"])
    for images in drawn:
        codes = dense_codes(family, images)
        assert [len(of_image) for of_image in codes] == [64, 64]
        assert torch.equal(torch.stack(codes), own)
    assert dense_codes(family, Images()) == []
    ours, theirs = (teacher_targets(distiller.model, batch, 0.5) for batch in (latents, pixels))
    assert ours.pop("teacher_states_weight") == theirs.pop("teacher_states_weight") == 0.5
    assert_same(ours, theirs)


def test_the_teacher_loses_the_captions_that_the_adapter_loses(base, make_distiller):
    distiller = make_distiller(attach(base), caption_dropout=0.5)
    rows, pad = [scenes_dataset(32, 1)[row] for row in range(1, 32, 2)], distiller.processing_class.tokenizer.pad_token_id
    lost = []
    for distiller.data_collator.collator.epoch in range(2):
        batch = distiller.data_collator(rows)
        ours, theirs = ((one["input_ids"][:, 2] == pad).tolist() for one in (batch, batch["teacher"]))
        assert ours == theirs
        lost.append(ours)
    assert lost[0] != lost[1]
    assert 0 < sum(lost[0]) < len(rows)


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
