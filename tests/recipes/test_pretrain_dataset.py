"""`pretrain_tiny.py --dataset`: a tiny base of captioned images that nobody prepared."""

import json

import pretrain_tiny
import pytest
import torch
from datasets import Dataset
from helpers import DENSE, IMAGE, chat, draw, question_inputs, rng
from PIL import Image, ImageDraw
from rows.conversations import DatasetError
from rows.turns import CAPTION_REQUEST
from tiny_world.caption_pool import CaptionPool, WordHead, caption_words, captioned_rows
from tiny_world.shapes import SHAPES
from tiny_world.tiny_janus import make_model, make_processor
from transformers import AutoModelForImageTextToText, AutoProcessor

from uc_adapters.families import family_of

FEW = {"vq_steps": 1, "vision_steps": 1, "joint_steps": 1}  # test_tiny_emu3.py has the two phases of `vq_steps`
COLOURS = ["crimson", "teal", "ivory", "navy"]
CAPTION = "A CRIMSON no. 7, beside an ellipse!"


def picture(number: int, size: tuple[int, int] = (80, 80)) -> Image.Image:
    image = Image.new("RGB", size, "grey")
    ImageDraw.Draw(image).ellipse((10, 10, 30 + number, 60), fill=COLOURS[number % 4].replace("ivory", "white"))
    return image


def caption(number: int) -> str:
    return CAPTION if number == 0 else f"a {COLOURS[number % 4]} no. {number}, beside an ellipse"


def write_folder(folder, count: int, size: tuple[int, int] = (80, 80)):
    """An imagefolder of `count` captioned pictures."""
    folder.mkdir()
    for number in range(count):
        picture(number, size).save(folder / f"{number}.png")
    lines = [json.dumps({"file_name": f"{number}.png", "text": caption(number)}) for number in range(count)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "pictures", 48)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("family", pretrain_tiny.FAMILIES)
def test_a_base_of_captioned_images_loads_knows_their_words_and_draws(family, pictures, tmp_path):
    folder = str(tmp_path / "base")
    arguments = {"family": family, "dataset": str(pictures), "output_dir": folder, "work_dir": str(tmp_path / "work")}
    pretrain_tiny.main(pretrain_tiny.PretrainArguments(**arguments, **FEW))
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert model.dtype == torch.float32
    tokenizer = processor.tokenizer
    for text in [*map(caption, range(48)), CAPTION_REQUEST, "crimson 9876543210"]:
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id in tokenizer("a zebra")["input_ids"]
    if family == "janus":
        inputs = question_inputs(processor, [CAPTION_REQUEST], [picture(0)])
        prompt = processor(text=[chat(processor, CAPTION)], return_tensors="pt", generation_mode="image")
        tokens = draw(model, prompt, do_sample=True)
        assert tokens.shape == (1, DENSE)
    else:
        text = chat(processor, IMAGE, CAPTION_REQUEST).replace(IMAGE, processor.image_token)
        inputs = processor(text=[text], images=[picture(0)], return_tensors="pt")
    assert tokenizer.unk_token_id not in inputs["input_ids"]
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.usefixtures("small_batches")
def test_it_learns_the_codes_that_the_saved_tokenizer_makes(pictures, tmp_path, monkeypatch):
    pools = []
    monkeypatch.setattr(pretrain_tiny, "train_joint", lambda tiny, steps, shape: pools.append(tiny.pool) or {})
    folder = str(tmp_path / "base")
    arguments = {"dataset": str(pictures), "output_dir": folder, "work_dir": str(tmp_path / "work")}
    pretrain_tiny.main(pretrain_tiny.PretrainArguments(**arguments, **FEW))
    saved = family_of(AutoModelForImageTextToText.from_pretrained(folder))
    (pool,) = pools
    assert torch.equal(saved.dense_codes(pool.pixel_values(torch.arange(48))), pool.codes)


@torch.no_grad()
def test_a_small_base_has_256_codes_an_image():
    processor = make_processor(shape=SHAPES["small"])
    model = make_model(processor, SHAPES["small"])
    assert sum(parameter.numel() for parameter in model.parameters()) < 20_000_000
    inputs = question_inputs(processor, [CAPTION_REQUEST], [picture(0)])
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 256
    features = model.model.vision_model(inputs["pixel_values"]).last_hidden_state
    codes = model.model.vqmodel.encode(inputs["pixel_values"]).image_tokens
    assert features.shape[1] == codes.numel() == model.config.vision_config.num_image_tokens == 256
    assert model.decode_image_tokens(codes.view(1, 256)).shape == (1, 64, 64, 3)


def test_what_is_read_is_moved_and_tinted_a_little_and_white_stays_white(pictures, processor):
    pool = CaptionPool(captioned_rows(str(pictures), 48, rng(0)), processor, rng(0))
    rows = rng(1).integers(48, size=4)
    pool.pixels[rows[0]] = 255
    before, first, second = pool.pixel_values(rows), pool.seen(rows), pool.seen(rows)
    assert first.shape == before.shape
    assert not torch.equal(first, second)
    assert torch.equal(first[0], before[0])
    assert first.abs().max() <= 1
    assert torch.equal(pool.pixel_values(rows), before)  # what is drawn does not move


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": "huge"}, "--shape 'huge' with --family janus; expected tiny, or small with janus"),
        ({"shape": "small", "family": "emu3"}, "--shape 'small' with --family emu3; expected tiny"),
        ({"device": "tpu"}, "--device 'tpu' is not here; expected cpu"),
    ],
)
def test_a_shape_or_a_device_that_is_not_there_is_refused(arguments, message, tmp_path):
    work = tmp_path / "work"
    with pytest.raises(SystemExit, match=message):
        pretrain_tiny.main(pretrain_tiny.PretrainArguments(output_dir=str(tmp_path / "base"), work_dir=str(work), **arguments))
    assert not work.exists()


def test_images_are_what_the_processor_makes_of_them(tmp_path):
    wide = write_folder(tmp_path / "wide", 48, (80, 40))
    rows, processor = captioned_rows(str(wide), 100, rng(0)), make_processor()
    pool = CaptionPool(rows, processor, rng(0))
    image = Image.open(rows[5]["images"][0]["path"])
    expected = processor.image_processor([image], return_tensors="pt")["pixel_values"]
    assert torch.allclose(pool.pixel_values([5]), expected, atol=1e-2)
    assert pool.captions[5] == rows[5]["caption"]


def test_a_wrong_hue_costs_more_than_a_wrong_brightness_and_a_wrong_area_more_than_noise(processor):
    greys = [Image.new("RGB", (64, 64), (value,) * 3) for value in range(0, 256, 8)]
    tints = [Image.new("RGB", (64, 64), tint) for tint in [(150, 110, 110), (110, 150, 110), (110, 110, 150)] * 2]
    rows = [{"images": [image], "caption": "a tint", "origin": ""} for image in greys + tints]
    pool = CaptionPool(Dataset.from_list(rows), processor, rng(0))
    right = torch.zeros(1, 3, 64, 64)

    def loss(wrong: torch.Tensor) -> float:
        return pool.restoration_loss(right + wrong, right).item()

    brightness, hue = (torch.tensor(error).view(1, 3, 1, 1) * 0.1 for error in ([1.0, 1.0, 1.0], [1.0, -1.0, 0.0]))
    noise = (torch.arange(64) % 2 * 2 - 1).float().view(1, 1, 1, 64)
    assert loss(hue) > 1.5 * loss(brightness)  # though it is smaller by a third
    assert loss(brightness) > loss(brightness * noise)
    assert loss(0 * hue) == 0


def test_a_conversation_is_what_the_chat_template_makes_of_it(pictures, processor):
    pool = CaptionPool(captioned_rows(str(pictures), 48, rng(0)), processor, rng(0))
    question, drawn = chat(processor, IMAGE, CAPTION_REQUEST), chat(processor, pool.captions[3])
    tokens = processor.tokenizer.tokenize
    assert tokens(pool.conversation(3, IMAGE)) == tokens(f"{question} {pool.captions[3]}<eos>")
    assert tokens(pool.prompt(3, processor.image_start_token)) == tokens(drawn + processor.image_start_token)


def test_a_pool_takes_so_many_rows_at_most_in_random_order(pictures):
    few = [captioned_rows(str(pictures), 20, rng(seed))["caption"] for seed in (0, 0, 1)]
    assert len(few[0]) == len(set(few[0])) == 20
    assert list(few[0]) == list(few[1]) != list(few[2])


def test_of_conversations_those_that_draw_from_a_caption_are_taken(tmp_path):
    drawn = [{"role": "user", "content": [{"type": "text", "text": "a teal dot"}]}]
    drawn.append({"role": "assistant", "content": [{"type": "image"}]})
    read = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]
    read.append({"role": "assistant", "content": [{"type": "text", "text": "one"}]})
    picture(0).save(tmp_path / "0.png")
    lines = [json.dumps({"messages": messages, "images": ["0.png"]}) for messages in [drawn, read] * 48]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert set(captioned_rows(str(tmp_path / "rows.jsonl"), 100, rng(0))["caption"]) == {"a teal dot"}


def test_an_image_without_a_caption_is_left_out_and_named(tmp_path, capsys):
    metadata = write_folder(tmp_path / "pictures", 50) / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace('"a teal no. 1, beside an ellipse"', '""'))
    assert len(captioned_rows(str(tmp_path / "pictures"), 100, rng(0))) == 49
    assert "1 row(s) have no caption to draw an image from: left out" in (told := capsys.readouterr().out)
    assert "1.png" in told


def test_the_vocabulary_is_digits_the_request_and_the_most_frequent_words():
    words = caption_words(["Teal, teal 12", "TEAL navy", "navy ivory"])
    assert words[-4:] == ["teal", "navy", ",", "ivory"]
    assert {*"0123456789", "describe", "the", "image", ".", ":"} == set(words[:-4])
    assert caption_words(["Teal, teal 12", "TEAL navy", "navy ivory"], most=17) == words[:17]


@pytest.mark.parametrize("in_order", [False, True])
def test_the_head_learns_which_words_belong_to_which_image(pictures, processor, in_order):
    torch.manual_seed(0)
    pool = CaptionPool(captioned_rows(str(pictures), 48, rng(0)), processor, rng(0))
    head = pool.head(64)
    assert isinstance(head, WordHead)
    states, rows = torch.randn(48, DENSE, 64), torch.arange(48).numpy()
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    first = head.loss(states, rows, in_order)
    for _ in range(30):
        optimizer.zero_grad()
        head.loss(states, rows, in_order).backward()
        optimizer.step()
    assert head.loss(states, rows, in_order) < first / 2


def test_too_few_images_are_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"47 images with a caption.*48 or more"):
        captioned_rows(str(write_folder(tmp_path / "few", 47)), 100, rng(0))


def test_a_dataset_without_captions_is_refused(tmp_path):
    picture(0).save(tmp_path / "0.png")
    row = {"image": "0.png", "question": "How many?", "answer": "one"}
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 60))
    with pytest.raises(DatasetError, match=r"rows.jsonl has 0 images with a caption.*image \+ text"):
        captioned_rows(str(tmp_path / "rows.jsonl"), 100, rng(0))


def test_an_image_that_cannot_be_opened_is_named(tmp_path, processor):
    folder = write_folder(tmp_path / "damaged", 48)
    (folder / "7.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"7\.png"):
        CaptionPool(captioned_rows(str(folder), 100, rng(0)), processor, rng(0))


def test_emu3_asks_for_square_images(tmp_path):
    wide = write_folder(tmp_path / "wide", 48, (80, 40))
    arguments = {"family": "emu3", "dataset": str(wide), "work_dir": str(tmp_path / "work")}
    with pytest.raises(DatasetError, match=r"png.*expected a square image.*janus"):
        pretrain_tiny.main(pretrain_tiny.PretrainArguments(**arguments, **FEW))
