import pytest
import torch
from digits import random_scene
from helpers import DRAWN, SHORT, attach, draw, drawing_inputs, rng, small_config
from tiny_janus import make_processor

from uc_adapters import UniCompressCollator
from uc_adapters.errors import InputError
from uc_adapters.images import pack_latents

IMAGE = {"type": "image"}


def say(text: str) -> dict:
    return {"type": "text", "text": text}


def turns(*contents) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def picture(seed: int):
    return random_scene(rng(seed), "train").image("train")


@pytest.fixture
def reading_row(images):
    return {"messages": turns([IMAGE, say("What digit is at the top left?")], [say("3")]), "images": images[:1]}


@pytest.fixture
def drawing_row(images):
    return {"messages": turns([say("a red 3 at the top left")], [IMAGE]), "images": images[1:2]}


@pytest.fixture
def editing_row(images):
    return {"messages": turns([IMAGE, say("a red 3")], [IMAGE]), "images": images[2:4]}


@pytest.fixture
def collate(short_processor):
    return UniCompressCollator(short_processor, small_config(), caption_dropout=0.0)


def words(processor, ids) -> list[str]:
    return processor.tokenizer.convert_ids_to_tokens(ids.tolist())


def learned(processor, batch, row: int = 0) -> list[str]:
    return words(processor, batch["input_ids"][row][batch["labels"][row] != -100])


def test_a_reading_rows_answer_is_learned_and_nothing_else(collate, short_processor, reading_row):
    batch = collate([reading_row])
    assert learned(short_processor, batch) == ["3", "<eos>"]
    assert "drawn_mask" not in batch
    assert "drawn_pixel_values" not in batch
    assert batch["pixel_values"].shape == (1, 3, 64, 64)


def test_every_answer_of_a_conversation_is_learned(collate, short_processor):
    row = {"messages": turns([say("How many digits are there?")], [say("2")], [say("What colour is the 3?")], [say("red")])}
    assert learned(short_processor, collate([row])) == ["2", "<eos>", "red", "<eos>"]


def test_content_may_be_a_plain_string(collate, short_processor):
    row = {"messages": turns("How many digits are there?", "2"), "images": None}
    assert learned(short_processor, collate([row])) == ["2", "<eos>"]


@pytest.mark.parametrize(("decompressor", "drawn_globals"), [("strip", 0), ("cell", 4)])
def test_a_drawing_rows_places_are_learned_but_not_the_separator_nor_the_images_begin_and_end(
    short_processor, drawing_row, decompressor, drawn_globals
):
    collate = UniCompressCollator(short_processor, small_config(decompressor=decompressor), caption_dropout=0.0)
    batch, count = collate([drawing_row]), drawn_globals + 1 + 16
    tokens, labels, drawn = (batch[name][0] for name in ("input_ids", "labels", "drawn_mask"))
    first = words(short_processor, tokens).index("<begin_of_image>") + 1
    expected = torch.full_like(labels, -100)
    expected[first : first + count] = short_processor.tokenizer.convert_tokens_to_ids("<image_placeholder>")
    expected[first + drawn_globals] = -100  # the separator, behind the global tokens
    expected[first + count + 1] = short_processor.tokenizer.eos_token_id
    assert torch.equal(labels, expected)
    assert drawn.nonzero().flatten().tolist() == list(range(first, first + count))
    assert "pixel_values" not in batch
    assert batch["drawn_pixel_values"].shape == (1, 3, 64, 64)


def test_without_global_tokens_the_separator_comes_first(drawing_row):
    processor = make_processor(17)
    batch = UniCompressCollator(processor, small_config(num_global_tokens=0), caption_dropout=0.0)([drawing_row])
    places = batch["drawn_mask"][0].nonzero().flatten()
    assert len(places) == 17
    assert (batch["labels"][0][places] == -100).tolist() == [True] + [False] * 16


def test_drawing_is_learned_behind_exactly_the_prompt_that_generation_uses(collate, short_processor, drawing_row):
    tokens = collate([drawing_row])["input_ids"][0]
    prompt = drawing_inputs(short_processor, ["a red 3 at the top left"])["input_ids"][0]
    assert torch.equal(tokens[: len(prompt)], prompt)


def test_an_image_is_read_in_a_user_turn_and_drawn_in_an_assistant_turn(collate, short_processor, editing_row, images):
    batch = collate([editing_row])
    pixels = short_processor.image_processor(images[2:4], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], pixels[:1])
    assert torch.equal(batch["drawn_pixel_values"], pixels[1:])
    assert batch["drawn_mask"].sum() == DRAWN
    assert (batch["input_ids"] == 4).sum() == SHORT + DRAWN
    assert learned(short_processor, batch) == ["<image_placeholder>"] * (DRAWN - 1) + ["<eos>"]


def test_an_image_in_a_later_user_turn_is_read(collate, images):
    row = {
        "messages": turns([say("a red 3")], [IMAGE], [IMAGE, say("How many digits are there?")], [say("1")]),
        "images": images[:2],
    }
    batch = collate([row])
    assert (len(batch["pixel_values"]), len(batch["drawn_pixel_values"])) == (1, 1)


def test_two_drawn_images_in_a_turn_have_a_separator_each(collate, short_processor, images):
    batch = collate([{"messages": turns([say("a red 3")], [IMAGE, IMAGE]), "images": images[:2]}])
    assert batch["drawn_mask"].sum() == 2 * DRAWN
    assert learned(short_processor, batch).count("<image_placeholder>") == 2 * (DRAWN - 1)


def test_a_batch_is_padded_on_the_right_and_padding_is_neither_seen_nor_learned(collate, reading_row, drawing_row, editing_row):
    rows = [reading_row, drawing_row, editing_row]
    batch = collate(rows)
    for index, row in enumerate(rows):
        alone = collate([row])
        length = alone["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][index, :length], alone["input_ids"][0])
        assert torch.equal(batch["labels"][index, :length], alone["labels"][0])
        assert batch["attention_mask"][index].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
        assert (batch["labels"][index, length:] == -100).all()
        assert not batch["drawn_mask"][index, length:].any()
    assert (len(batch["pixel_values"]), len(batch["drawn_pixel_values"])) == (2, 2)


def test_a_dropped_caption_is_the_prompt_of_the_unconditional_model(short_processor, drawing_row, base):
    batch = UniCompressCollator(short_processor, small_config(), caption_dropout=1.0)([drawing_row])
    model = attach(base)
    prompt = drawing_inputs(short_processor, ["a red 3 at the top left"])["input_ids"]
    blank = model.family.unconditional(prompt, base.generation_config)
    assert torch.equal(batch["input_ids"][:, : prompt.shape[1]], blank)
    assert batch["attention_mask"].all()
    assert learned(short_processor, batch) == ["<image_placeholder>"] * (DRAWN - 1) + ["<eos>"]


def test_a_dropped_prompt_loses_its_images_to_read(short_processor, editing_row, base):
    batch = UniCompressCollator(short_processor, small_config(), caption_dropout=1.0)([editing_row])
    assert "pixel_values" not in batch
    assert (batch["input_ids"] == 4).sum() == batch["drawn_mask"].sum() == DRAWN
    assert attach(base)(**batch).loss.isfinite()


def test_a_dropped_prompt_keeps_the_images_behind_the_drawing(short_processor, images, base):
    row = {
        "messages": turns([IMAGE, say("a red 3")], [IMAGE], [IMAGE, say("How many digits are there?")], [say("1")]),
        "images": images[:3],
    }
    batch = UniCompressCollator(short_processor, small_config(), caption_dropout=1.0)([row])
    kept = short_processor.image_processor(images[2:3], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], kept)
    assert attach(base)(**batch).loss.isfinite()


def test_reading_rows_are_never_dropped(short_processor, collate, reading_row):
    dropping = UniCompressCollator(short_processor, small_config(), caption_dropout=1.0)
    assert torch.equal(dropping([reading_row])["input_ids"], collate([reading_row])["input_ids"])


def dropped(processor, batch) -> list[bool]:
    return (batch["input_ids"][:, 2] == processor.tokenizer.pad_token_id).tolist()


def test_the_share_of_dropped_captions(short_processor, drawing_row):
    collate = UniCompressCollator(short_processor, small_config(), caption_dropout=0.25)
    coins = []
    for collate.epoch in range(200):
        coins += dropped(short_processor, collate([drawing_row]))
    assert 0.15 < sum(coins) / len(coins) < 0.35


def test_which_captions_are_dropped_does_not_depend_on_batches_nor_on_random_numbers(short_processor, images):
    rows = [{"messages": turns([say("a red 3")], [IMAGE]), "images": [picture(seed)]} for seed in range(32)]
    collate = UniCompressCollator(short_processor, small_config(), caption_dropout=0.5)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    at_once = dropped(short_processor, collate(rows))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert [dropped(short_processor, collate([row]))[0] for row in reversed(rows)] == at_once[::-1]
    assert 0 < sum(at_once) < 32  # rows of one caption differ by their images
    collate.epoch = 1
    assert dropped(short_processor, collate(rows)) != at_once


def test_latents_stand_in_for_the_images_to_draw(short_processor, collate, base, drawing_row, editing_row):
    model = attach(base)
    rows = [drawing_row, editing_row]
    collate.config = model.active_peft_config
    packed = [{**row, "latents": pack_latents(model.family, short_processor, row["images"])} for row in rows]
    plain, cached = collate(rows), collate(packed)
    pixels, latents = plain.pop("drawn_pixel_values"), cached.pop("drawn_latents")
    assert plain.keys() == cached.keys()
    assert all(torch.equal(plain[name], cached[name]) for name in plain)
    assert latents.shape == (2, 64, 8)
    with torch.no_grad():
        torch.testing.assert_close(latents, model.family.latents(pixels))
        expected, found = model(**plain, drawn_pixel_values=pixels), model(**cached, drawn_latents=latents)
    torch.testing.assert_close(found.log_probs, expected.log_probs)


def test_latents_that_cannot_be_are_refused(short_processor, collate, base, drawing_row):
    model = attach(base)
    collate.config = model.active_peft_config
    batch = collate([{**drawing_row, "latents": pack_latents(model.family, short_processor, drawing_row["images"])}])
    latents = batch.pop("drawn_latents")
    with pytest.raises(InputError, match=r"drawn_latents of shape \(1, 63, 8\); expected \(images, 64, 8\)"):
        model(**batch, drawn_latents=latents[:, 1:])
    with pytest.raises(InputError, match=r"at once; expected one of them"):
        model(**batch, drawn_latents=latents, drawn_pixel_values=torch.zeros(1, 3, 64, 64))


def test_rows_are_left_as_they_were(collate, editing_row):
    before = [str(editing_row["messages"]), [image.tobytes() for image in editing_row["images"]]]
    collate([editing_row])
    assert [str(editing_row["messages"]), [image.tobytes() for image in editing_row["images"]]] == before


def test_an_empty_batch_is_refused(collate):
    with pytest.raises(InputError, match=r"empty batch.*at least one"):
        collate([])


@pytest.mark.parametrize("count", [0, 2])
def test_a_wrong_number_of_images_is_refused(collate, reading_row, images, count):
    with pytest.raises(InputError, match=rf"{count} image\(s\) for 1 image part"):
        collate([{**reading_row, "images": images[:count]}])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_an_image_that_is_not_rgb_is_refused(collate, reading_row, images, mode):
    with pytest.raises(InputError, match=rf"'{mode}'.*'RGB'.*convert"):
        collate([{**reading_row, "images": [images[0].convert(mode)]}])


@pytest.mark.parametrize("image", ["picture.png", b"bytes", None])
def test_what_is_no_image_is_refused(collate, reading_row, image):
    with pytest.raises(InputError, match="RGB"):
        collate([{**reading_row, "images": [image]}])


def test_a_chat_template_that_rewrites_earlier_turns_is_refused(collate, reading_row):
    processor = make_processor(SHORT)
    processor.chat_template = "{{ messages | length }}" + processor.chat_template
    with pytest.raises(InputError, match="chat template"):
        UniCompressCollator(processor, small_config())([reading_row])


def test_a_model_trained_on_a_batch_draws_from_its_prompts(base, collate, short_processor, drawing_row):
    model = attach(base)
    assert model(**collate([drawing_row])).loss.isfinite()
    assert draw(model, drawing_inputs(short_processor, ["a red 3 at the top left"])).shape == (1, 64)
