import pytest
import torch
from helpers import DRAWN, SHORT, attach, draw, drawing_inputs, rng, small_config
from tiny_world.digits import random_scene
from tiny_world.tiny_janus import make_processor
from torch.utils.data import DataLoader

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
    assert "gen_mask" not in batch
    assert "gen_pixel_values" not in batch
    assert batch["pixel_values"].shape == (1, 3, 64, 64)


def test_every_answer_of_a_conversation_is_learned(collate, short_processor):
    row = {"messages": turns([say("How many digits are there?")], [say("2")], [say("What colour is the 3?")], [say("red")])}
    assert learned(short_processor, collate([row])) == ["2", "<eos>", "red", "<eos>"]


def test_content_may_be_a_plain_string(collate, short_processor):
    row = {"messages": turns("How many digits are there?", "2"), "images": None}
    assert learned(short_processor, collate([row])) == ["2", "<eos>"]


@pytest.mark.parametrize(("decompressor", "drawn_globals"), [("strip", 0), ("phase", 4)])
def test_a_drawing_rows_places_are_learned_but_not_the_separator_nor_the_images_begin_and_end(
    short_processor, drawing_row, decompressor, drawn_globals
):
    collate = UniCompressCollator(short_processor, small_config(decompressor=decompressor), caption_dropout=0.0)
    batch, count = collate([drawing_row]), drawn_globals + 1 + 16
    tokens, labels, drawn = (batch[name][0] for name in ("input_ids", "labels", "gen_mask"))
    first = words(short_processor, tokens).index("<begin_of_image>") + 1
    expected = torch.full_like(labels, -100)
    expected[first : first + count] = short_processor.tokenizer.convert_tokens_to_ids("<image_placeholder>")
    expected[first + drawn_globals] = -100  # the separator, behind the global tokens
    expected[first + count + 1] = short_processor.tokenizer.eos_token_id
    assert torch.equal(labels, expected)
    assert drawn.nonzero().flatten().tolist() == list(range(first, first + count))
    assert "pixel_values" not in batch
    assert batch["gen_pixel_values"].shape == (1, 3, 64, 64)


def test_without_global_tokens_the_separator_comes_first(drawing_row):
    processor = make_processor(17)
    batch = UniCompressCollator(processor, small_config(num_global_tokens=0), caption_dropout=0.0)([drawing_row])
    places = batch["gen_mask"][0].nonzero().flatten()
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
    assert torch.equal(batch["gen_pixel_values"], pixels[1:])
    assert batch["gen_mask"].sum() == DRAWN
    assert (batch["input_ids"] == 4).sum() == SHORT + DRAWN
    assert learned(short_processor, batch) == ["<image_placeholder>"] * (DRAWN - 1) + ["<eos>"]


def test_an_image_in_a_later_user_turn_is_read(collate, short_processor, images):
    row = {
        "messages": turns([say("a red 3")], [IMAGE], [IMAGE, say("How many digits are there?")], [say("1")]),
        "images": images[:2],
    }
    batch, rows = collate.with_rows([row])
    pixels = short_processor.image_processor(images[:2], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["gen_pixel_values"], pixels[:1])
    assert torch.equal(batch["pixel_values"], pixels)  # what was drawn is read, too, where the conversation goes on
    assert rows == [0, 0]  # two sequences: the one draws, the other answers


def test_each_of_two_images_in_a_turn_is_drawn_in_a_sequence_of_its_own(collate, short_processor, images):
    batch = collate([{"messages": turns([say("a red 3")], [IMAGE, IMAGE]), "images": images[:2]}])
    assert batch["gen_mask"].sum(1).tolist() == [DRAWN, DRAWN]
    for row in (0, 1):
        assert learned(short_processor, batch, row) == ["<image_placeholder>"] * (DRAWN - 1) + ["<eos>"]
    assert len(batch["pixel_values"]) == 1


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
        assert not batch["gen_mask"][index, length:].any()
    assert (len(batch["pixel_values"]), len(batch["gen_pixel_values"])) == (2, 2)


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
    assert (batch["input_ids"] == 4).sum() == batch["gen_mask"].sum() == DRAWN
    assert attach(base)(**batch).loss.isfinite()


def test_a_dropped_prompt_leaves_what_is_asked_behind_the_drawing(short_processor, images, base):
    row = {
        "messages": turns([IMAGE, say("a red 3")], [IMAGE], [IMAGE, say("How many digits are there?")], [say("1")]),
        "images": images[:3],
    }
    batch = UniCompressCollator(short_processor, small_config(), caption_dropout=1.0)([row])
    kept = short_processor.image_processor(images[:3], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], kept)
    assert learned(short_processor, batch, 1) == ["1", "<eos>"]
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
    collate.epoch = 0
    torch.manual_seed(0)
    state = torch.get_rng_state()
    at_once = dropped(short_processor, collate(rows))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert [dropped(short_processor, collate([row]))[0] for row in reversed(rows)] == at_once[::-1]
    assert 0 < sum(at_once) < 32  # rows of one caption differ by their images
    collate.epoch = 1
    assert dropped(short_processor, collate(rows)) != at_once


def test_each_occurrence_of_a_row_has_its_own_chance(short_processor, drawing_row):
    rows = [drawing_row | {"occurrence": number} for number in range(200)]
    collate = UniCompressCollator(short_processor, small_config(), caption_dropout=0.25)
    collate.epoch = 0
    coins = dropped(short_processor, collate(rows))
    assert 0.15 < sum(coins) / len(coins) < 0.35
    assert dropped(short_processor, collate(rows[::-1])) == coins[::-1]
    assert len(set(dropped(short_processor, collate([drawing_row] * 8)))) == 1  # untold repeats share one chance


@pytest.mark.parametrize(
    "workers", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}], ids=["none", "new", "persistent"]
)
@pytest.mark.parametrize("told", [False, True], ids=["counted", "set"])
def test_other_captions_are_dropped_in_each_epoch_whoever_trains(short_processor, workers, told):
    rows = [{"messages": turns([say("a red 3")], [IMAGE]), "images": [picture(seed)]} for seed in range(32)]
    collate = UniCompressCollator(short_processor, small_config(), caption_dropout=0.5)
    loader, epochs = DataLoader(rows, batch_size=4, collate_fn=collate, **workers), []
    for epoch in range(3):
        if told:
            collate.epoch = epoch
        epochs.append([coin for batch in loader for coin in dropped(short_processor, batch)])
    assert all(4 < sum(coins) < 28 for coins in epochs)
    assert len({tuple(coins) for coins in epochs}) == 3
    if told:  # then it does not matter who collates
        collate.epoch = 1
        assert dropped(short_processor, collate(rows)) == epochs[1]


def test_where_nothing_is_by_chance_no_row_is_remembered(collate, drawing_row, reading_row):
    collate([drawing_row, reading_row])
    assert not collate.chance._seen


def test_turns_given_are_context_only(collate, short_processor):
    row = {"messages": turns([say("a red 3")], [say("2")], [say("What colour is the 3?")], [say("red")]), "given": 3}
    assert learned(short_processor, collate([row])) == ["red", "<eos>"]


@pytest.mark.parametrize("text", ["<image>What digit is at the top left?", "What digit is <image> at the top left?"])
def test_a_marker_in_a_plain_string_is_the_place_of_an_image(collate, images, text):
    before, after = text.split("<image>")
    parts = [*([say(before)] if before else []), IMAGE, say(after)]
    found, expected = (collate([{"messages": turns(asked, "3"), "images": images[:1]}]) for asked in (text, parts))
    assert torch.equal(found["input_ids"], expected["input_ids"])


def test_images_without_a_place_go_in_front_of_the_first_plain_string(collate, images):
    found, expected = (
        collate([{"messages": turns(asked, "3"), "images": images[:2]}])
        for asked in ("a red 3", [IMAGE, IMAGE, say("a red 3")])
    )
    assert torch.equal(found["input_ids"], expected["input_ids"])


@pytest.mark.parametrize(
    ("messages", "count", "told"),
    [
        (turns([IMAGE, say("<image>a red 3")], "3"), 1, r"1 image\(s\) for 2 image part"),
        (turns("<image>a red 3", "3"), 0, r"turn 1 \(user\) has the image token <image> in its text"),
        (turns("a red 3 <begin_of_image>", "3"), 0, r"image token <begin_of_image> in its text"),
        (turns("a red 3", "3<eos>"), 0, r"An answer has <eos> in its text.*adds it"),
        (turns("a red 3"), 0, r"Nothing to learn"),
        (turns("a red 3", " "), 0, r"turn 2 \(assistant\) has a text that is empty"),
        ([{"role": "human", "content": "a red 3"}], 0, r"role 'human'; expected system"),
        ([{"role": "system", "content": [IMAGE]}], 1, r"expected images to read in user turns"),
        (turns([{"type": "video"}], "3"), 0, r"a part of type 'video'; expected 'text' or 'image'"),
        (None, 0, r"no messages"),
    ],
)
def test_a_bad_row_is_named(collate, reading_row, images, messages, count, told):
    bad = {"messages": messages, "images": images[:count]}
    with pytest.raises(InputError, match=rf"Row 2 of the batch: .*{told}"):
        collate([reading_row, bad])
    with pytest.raises(InputError, match=rf"scans, row 7: .*{told}"):
        collate([{**bad, "origin": "scans, row 7"}])


def test_latents_stand_in_for_the_images_to_draw(short_processor, collate, base, drawing_row, editing_row):
    model = attach(base)
    rows = [drawing_row, editing_row]
    collate.config = model.active_peft_config
    packed = [{**row, "latents": pack_latents(model.family, short_processor, row["images"])} for row in rows]
    plain, cached = collate(rows), collate(packed)
    pixels, latents = plain.pop("gen_pixel_values"), cached.pop("gen_latents")
    assert plain.keys() == cached.keys()
    assert all(torch.equal(plain[name], cached[name]) for name in plain)
    assert latents.shape == (2, 64, 8)
    with torch.no_grad():
        torch.testing.assert_close(latents, model.family.latents(pixels))
        expected, found = model(**plain, gen_pixel_values=pixels), model(**cached, gen_latents=latents)
    torch.testing.assert_close(found.log_probs, expected.log_probs)


def test_latents_that_cannot_be_are_refused(short_processor, collate, base, drawing_row):
    model = attach(base)
    collate.config = model.active_peft_config
    batch = collate([{**drawing_row, "latents": pack_latents(model.family, short_processor, drawing_row["images"])}])
    latents = batch.pop("gen_latents")
    with pytest.raises(InputError, match=r"gen_latents of shape \(1, 63, 8\); expected \(images, 64, 8\)"):
        model(**batch, gen_latents=latents[:, 1:])
    with pytest.raises(InputError, match=r"at once; expected one of them"):
        model(**batch, gen_latents=latents, gen_pixel_values=torch.zeros(1, 3, 64, 64))


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
