import io
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature
from finetune_runs import say, turn, write_rows
from helpers import rng
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rows.conversations import FORMS, UNFINISHED_FORMS, DatasetError, column_names, conversations, samples
from rows.turns import CAPTION_REQUEST

from uc_adapters.messages import malformed
from uc_adapters.pictures import to_rgb

IMAGE = {"type": "image"}
MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F", "I;16", "I;16B"]
BOTH = pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])


def noise(seed: int = 0, size: tuple[int, int] = (12, 8)) -> Image.Image:
    return Image.fromarray(rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def png(seed: int = 0) -> bytes:
    file = io.BytesIO()
    noise(seed).save(file, "PNG")
    return file.getvalue()


def saved(image: Image.Image, file_format: str, **options) -> Image.Image:
    """The image as it comes back from a file of that format."""
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return samples(Dataset.from_dict({"images": [[{"path": None, "bytes": file.getvalue()}]]}))[0]["images"][0]


@pytest.fixture
def folder(tmp_path):
    """Two images."""
    for seed in range(2):
        noise(seed).save(tmp_path / f"{seed}.png")
    return tmp_path


def messages_of(source: str, streaming: bool = False, **options) -> list[list[dict]]:
    return [row["messages"] for row in samples(conversations(source, streaming, **options))]


@BOTH
def test_image_and_text_are_drawn_first_and_then_described(folder, streaming):
    source = write_rows(folder / "rows.jsonl", [{"image": "0.png", "text": "a red 3"}, {"image": "1.png", "text": "a blue 7"}])
    rows = list(samples(conversations(source, streaming)))
    assert [row["first"] for row in rows] == [True, False, True, False]
    assert rows[0]["messages"] == [turn("user", say("a red 3")), turn("assistant", IMAGE)]
    assert rows[3]["messages"] == [turn("user", IMAGE, say(CAPTION_REQUEST)), turn("assistant", say("a blue 7"))]
    assert [row["images"][0].tobytes() for row in rows] == [noise(seed).tobytes() for seed in (0, 0, 1, 1)]
    assert [row["origin"] for row in rows[1:3]] == [f"{source}, row 0 (0.png)", f"{source}, row 1 (1.png)"]


@BOTH
def test_image_question_and_answer_are_read(folder, streaming):
    rows = [{"image": "0.png", "question": "How many?", "answer": "3", "text": "one more column"}]
    source = write_rows(folder / "rows.jsonl", rows)
    assert messages_of(source, streaming) == [[turn("user", IMAGE, say("How many?")), turn("assistant", say("3"))]]


@BOTH
def test_messages_and_images_stay_as_they_are(folder, streaming):
    messages = [turn("user", IMAGE, say("a red 3")), turn("assistant", IMAGE), turn("user", IMAGE), turn("assistant", say("1"))]
    source = write_rows(folder / "rows.jsonl", [{"messages": messages, "images": ["0.png", "1.png", "0.png"]}])
    (row,) = samples(conversations(source, streaming))
    assert row["messages"] == messages
    assert [image.tobytes() for image in row["images"]] == [noise(seed).tobytes() for seed in (0, 1, 0)]
    assert row["first"]


@BOTH
def test_images_without_a_place_stand_before_the_first_plain_user_turn(folder, streaming):
    asked = [{"role": "user", "content": "a red 3"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "ok"}]
    drawn = [{"role": "user", "content": "a red 3"}, turn("assistant", IMAGE)]  # plain and structured content in one column
    rows = [{"messages": asked, "images": ["0.png", "1.png"]}, {"messages": drawn, "images": ["0.png"]}]
    assert messages_of(write_rows(folder / "rows.jsonl", rows), streaming) == [
        [turn("user", IMAGE, IMAGE, say("a red 3")), turn("assistant", say("yes")), turn("user", say("ok"))],
        [turn("user", say("a red 3")), turn("assistant", IMAGE)],
    ]


def asks(*content: dict) -> list[dict]:
    return [turn("user", *content), turn("assistant", say("3"))]


def plain(role: str, text: str) -> dict:
    return {"role": role, "content": text}


def shared(speaker: str, text: str) -> dict:
    """A turn of ShareGPT's."""
    return {"from": speaker, "value": text}


RULE = turn("system", say("Be brief."))
QUESTION, ANSWER = plain("user", "How many?"), plain("assistant", "3")
# Columns of a row, the turns that they are, how many of these are given, and how many images there are.
ROWS = {
    "messages": ({"messages": [QUESTION, ANSWER]}, asks(say("How many?")), 0, 0),
    "messages + image": ({"messages": [QUESTION, ANSWER], "image": "0.png"}, asks(IMAGE, say("How many?")), 0, 1),
    "messages, no image in this row": ({"messages": [QUESTION, ANSWER], "image": None}, asks(say("How many?")), 0, 0),
    "messages + images, markers": (
        {"messages": [plain("user", "Is <image> like\n<image>\n?"), ANSWER], "images": ["0.png", "1.png"]},
        asks(say("Is "), IMAGE, say(" like"), IMAGE, say("?")),
        0,
        2,
    ),
    "a marker in an answer is drawn": (
        {"messages": [plain("user", "a red 3"), plain("assistant", "<image>")], "images": ["0.png"]},
        [turn("user", say("a red 3")), turn("assistant", IMAGE)],
        0,
        1,
    ),
    "prompt + completion": ({"prompt": "How many?", "completion": "3"}, asks(say("How many?")), 1, 0),
    "prompt + completion, numbers": ({"prompt": "How many?", "completion": 3}, asks(say("How many?")), 1, 0),
    "prompt + completion + image": (
        {"prompt": "How many?", "completion": "3", "image": "0.png"},
        asks(IMAGE, say("How many?")),
        1,
        1,
    ),
    "prompt + completion + images, turns": (
        {"prompt": [RULE, QUESTION, ANSWER, turn("user", IMAGE, say("Sure?"))], "completion": [ANSWER], "images": ["0.png"]},
        [RULE, *asks(say("How many?")), *asks(IMAGE, say("Sure?"))],
        4,
        1,
    ),
    "a prompt of turns, a completion in words": ({"prompt": [QUESTION], "completion": "3"}, asks(say("How many?")), 1, 0),
    "ShareGPT": (
        {"conversations": [shared("system", "Be brief."), shared("human", "How many?"), shared("gpt", "3")]},
        [RULE, *asks(say("How many?"))],
        0,
        0,
    ),
    "ShareGPT + image": (
        {"conversations": [shared("human", "<image>\nHow many?"), shared("gpt", "3")], "image": "0.png"},
        asks(IMAGE, say("How many?")),
        0,
        1,
    ),
    "ShareGPT + images, no marker": (
        {"conversations": [shared("user", "How many?"), shared("assistant", "3")], "images": ["0.png", "1.png"]},
        asks(IMAGE, IMAGE, say("How many?")),
        0,
        2,
    ),
    "an unknown speaker": (
        {"conversations": [shared("human", "How many?"), shared("oracle", "3")]},
        [turn("user", say("How many?")), turn("oracle", say("3"))],
        0,
        0,
    ),
    "image + question + answer": (
        {"image": "0.png", "question": "How many?", "answer": "3"},
        asks(IMAGE, say("How many?")),
        0,
        1,
    ),
    "a question with a marker": (
        {"image": "0.png", "question": "How many?\n<image>", "answer": "3"},
        asks(say("How many?"), IMAGE),
        0,
        1,
    ),
}


@BOTH
@pytest.mark.parametrize("also_unfinished", [False, True], ids=["labels", "distilled"])
@pytest.mark.parametrize(("row", "messages", "given", "images"), ROWS.values(), ids=ROWS)
def test_conversations_as_people_have_them(folder, row, messages, given, images, also_unfinished, streaming):
    forms = FORMS | UNFINISHED_FORMS if also_unfinished else None
    (made,) = samples(conversations(write_rows(folder / "rows.jsonl", [row]), streaming, forms))
    assert made["messages"] == messages
    assert (made["given"], made["taught"]) == (given, False)
    assert [image.tobytes() for image in made["images"]] == [noise(seed).tobytes() for seed in range(images)]


LACKING = {
    "no completion": {"prompt": "How many?", "completion": None},
    "no prompt": {"prompt": None, "completion": "3"},
    "no words in a turn": {"conversations": [{"from": "human", "value": None}]},
    "no speaker": {"conversations": [{"value": "How many?"}]},
    "no turns": {"conversations": None},
    "a speaker that is no name": {"conversations": [{"from": ["human"], "value": "How many?"}]},
    "a marker without an image": {"conversations": [shared("human", "<image>How many?"), shared("gpt", "3")], "image": None},
    "a marker in a caption": {"image": "0.png", "text": "<image> a red 3"},
}


@BOTH
@pytest.mark.parametrize("row", LACKING.values(), ids=LACKING)
def test_what_a_row_lacks_is_named_by_its_check(folder, processor, row, streaming):
    for messages in messages_of(write_rows(folder / "rows.jsonl", [row]), streaming):
        assert malformed(messages, processor) is not None


COLUMNS = {"image": "0.png", "images": ["0.png"], "img": "0.png", "text": "3", "question": "How many?", "answer": "3"}


@pytest.mark.parametrize("count", range(1, len(COLUMNS) + 1))
def test_a_teacher_takes_what_labels_take_and_what_lacks_one_thing_alone(folder, count):
    for names in combinations(COLUMNS, count):
        source = write_rows(folder / "rows.jsonl", [{name: COLUMNS[name] for name in names}])
        taught = accepted(source, FORMS | UNFINISHED_FORMS)
        assert taught == (accepted(source, FORMS) or set(names) in ({"text"}, {"image", "question"}))


def accepted(source: str, forms) -> bool:
    try:
        conversations(source, streaming=True, forms=forms)
    except DatasetError:
        return False
    return True


@BOTH
@pytest.mark.parametrize("words", [{"messages": [QUESTION, ANSWER]}, {"prompt": "a", "completion": "b"}], ids=["TRL", "prompt"])
@pytest.mark.parametrize("picture", ["0.png", ["0.png"], {"path": "0.png", "bytes": None}], ids=["path", "list", "Image"])
def test_words_beside_images_that_nobody_reads_are_refused(folder, words, picture, streaming):
    source = write_rows(folder / "rows.jsonl", [{**words, "img": None}, {**words, "img": picture}])
    with pytest.raises(DatasetError, match=r"has images in img, .*--columns images=img.*--columns \w+=\w+"):
        conversations(source, streaming)
    rows = samples(conversations(source, streaming, columns={"images": "img"}))
    assert [len(row["images"]) for row in rows] == [0, 1]
    assert len(list(conversations(source, streaming, columns={name: name for name in words}))) == 2


@BOTH
def test_columns_are_taken_by_the_names_that_they_have(folder, streaming, capsys):
    row = {"img": ["0.png"], "caption": "a red 3", "text": "of no use", "id": 7}
    source = write_rows(folder / "rows.jsonl", [row])
    drawn, _ = samples(conversations(source, streaming, columns={"image": "img", "text": "caption"}))
    assert drawn["messages"] == [turn("user", say("a red 3")), turn("assistant", IMAGE)]
    assert drawn["images"][0].tobytes() == noise(0).tobytes()
    assert f"{source}: reads the columns img, caption; leaves out text, id.\n" == capsys.readouterr().out


@BOTH
def test_columns_that_are_not_named_keep_their_names(folder, streaming, capsys):
    source = write_rows(folder / "rows.jsonl", [{"image": "0.png", "caption": "a red 3"}])
    forms = FORMS | UNFINISHED_FORMS  # with a teacher, too: the image is there, and is not left out
    assert len(messages_of(source, streaming, forms=forms, columns={"text": "caption"})) == 2
    assert capsys.readouterr().out == ""


@BOTH
def test_a_teacher_takes_one_column_of_many_where_it_is_named(folder, streaming):
    source = write_rows(folder / "rows.jsonl", [{"id": 7, "prompt": "a red 3"}])
    (messages,) = messages_of(source, streaming, forms=FORMS | UNFINISHED_FORMS, columns={"text": "prompt"})
    assert messages == [turn("user", say("a red 3")), turn("assistant", IMAGE)]


@BOTH
def test_the_form_that_is_read_has_all_the_named_columns(folder, streaming):
    row = {"messages": [QUESTION, ANSWER], "images": [], "image": "0.png", "caption": "a red 3"}
    source = write_rows(folder / "rows.jsonl", [row])
    assert len(messages_of(source, streaming, columns={"text": "caption"})) == 2
    with pytest.raises(DatasetError, match=r"images, image, caption and --columns txt=caption; expected one of"):
        conversations(source, streaming, columns={"txt": "caption"})
    with pytest.raises(DatasetError, match=r"has no column title; it has the columns messages, images, image, caption"):
        conversations(source, streaming, columns={"text": "title"})


def test_options_that_name_columns():
    assert column_names(None) == {}
    assert column_names(["text=a caption", "image=img"]) == {"text": "a caption", "image": "img"}


@pytest.mark.parametrize("pairs", [["caption"], ["text="], ["=caption"], ["text=a", "text=b"]], ids=str)
def test_options_that_name_no_columns_are_refused(pairs):
    with pytest.raises(DatasetError, match=r"--columns .*: expected .* such as text=caption"):
        column_names(pairs)


@BOTH
@pytest.mark.parametrize(
    "row", [{"image": {"path": "0.png"}, "text": "a red 3"}, {"image": "0.png", "text": "a red 3"}], ids=str
)
def test_paths_are_relative_to_the_file_wherever_a_run_starts(folder, row, streaming, tmp_path_factory, monkeypatch):
    source = write_rows(folder / "rows.jsonl", [row])
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    drawn, _ = samples(conversations(source, streaming))
    assert drawn["images"][0].tobytes() == noise(0).tobytes()


@BOTH
def test_a_folder_of_images_with_metadata(folder, streaming):
    write_rows(folder / "metadata.jsonl", [{"file_name": "1.png", "text": "a blue 7"}])
    drawn, _ = samples(conversations(str(folder), streaming))
    assert drawn["images"][0].tobytes() == noise(1).tobytes()
    assert drawn["origin"] == f"{folder}, row 0 (1.png)"


@BOTH
def test_a_folder_of_images_with_several_a_row(folder, streaming):
    messages = [turn("user", IMAGE, say("a red 3")), turn("assistant", IMAGE)]
    write_rows(folder / "metadata.jsonl", [{"file_names": ["1.png", "0.png"], "messages": messages}])
    (row,) = samples(conversations(str(folder), streaming))
    assert [image.tobytes() for image in row["images"]] == [noise(1).tobytes(), noise(0).tobytes()]


@BOTH
@pytest.mark.parametrize("feature", [None, ImageFeature()], ids=["bytes", "Image"])
def test_parquet_holds_its_images(tmp_path, feature, streaming):
    dataset = Dataset.from_dict({"image": [png(0), png(1)], "text": ["a red 3", "a blue 7"]})
    dataset = dataset.cast_column("image", feature) if feature else dataset
    dataset.to_parquet(tmp_path / "rows.parquet")
    rows = list(samples(conversations(str(tmp_path / "rows.parquet"), streaming)))
    assert [row["images"][0].tobytes() for row in rows] == [noise(seed).tobytes() for seed in (0, 0, 1, 1)]


@BOTH
def test_a_file_in_the_working_directory_never_takes_the_place_of_an_image_that_has_its_name(tmp_path, streaming, monkeypatch):
    images = [{"path": "cat.png", "bytes": png(0)}]
    Dataset.from_dict({"image": images, "text": ["a cat"]}).to_parquet(tmp_path / "rows.parquet")
    noise(1).save(tmp_path / "cat.png")
    monkeypatch.chdir(tmp_path)
    drawn, _ = samples(conversations(str(tmp_path / "rows.parquet"), streaming))
    assert drawn["images"][0].tobytes() == noise(0).tobytes()
    assert drawn["origin"].endswith("row 0 (cat.png)")


@BOTH
@pytest.mark.parametrize("answers", [[3, 4], ["three", "4"]], ids=["numbers", "words and digits"])
def test_whole_numbers_are_words(folder, answers, streaming):
    rows = [{"image": "0.png", "question": "How many?", "answer": answer} for answer in answers]
    told = [messages[1]["content"][0]["text"] for messages in messages_of(write_rows(folder / "rows.jsonl", rows), streaming)]
    assert told == [str(answer) for answer in answers]


def test_rows_stay_encoded_until_they_are_decoded(folder):
    source = write_rows(folder / "rows.jsonl", [{"image": "0.png", "text": "a red 3"}])
    assert conversations(source)[0]["images"] == [{"bytes": None, "path": str(folder / "0.png")}]


@BOTH
def test_other_columns_stay_when_rows_are_decoded(folder, streaming):
    rows = conversations(write_rows(folder / "rows.jsonl", [{"image": "0.png", "text": "a red 3"}]), streaming)
    latents = [[0.5, 1.0], [2.0, -1.0]]
    rows = samples(rows.map(lambda row: {"latents": latents}))
    drawn, described = rows
    assert drawn["latents"] == described["latents"] == latents
    assert isinstance(rows, IterableDataset) == streaming


def test_one_column_of_decoded_rows(folder):
    rows = samples(conversations(write_rows(folder / "rows.jsonl", [{"image": "0.png", "text": "a red 3"}])))
    assert rows["first"][:] == [True, False]
    assert rows["images"][0][0].mode == "RGB"


def test_an_image_that_changes_is_read_again(folder):
    source = write_rows(folder / "rows.jsonl", [{"image": "0.png", "text": "a red 3"}])
    before, again = conversations(source), conversations(source)
    noise(5, (30, 30)).save(folder / "0.png")
    assert before._fingerprint == again._fingerprint != conversations(source)._fingerprint


@BOTH
def test_columns_of_no_known_form_are_refused(folder, streaming):
    source = write_rows(folder / "rows.jsonl", [{"picture": "0.png", "caption": "a red 3"}])
    wanted = r"(?s)picture, caption; expected one of\n.*messages \+ images.*image \+ question \+ answer.*--columns text=caption"
    with pytest.raises(DatasetError, match=wanted):
        conversations(source, streaming)


@BOTH
def test_a_folder_of_images_without_metadata_is_refused(folder, streaming):
    with pytest.raises(DatasetError, match=r"2 image\(s\) and no texts .* metadata\.jsonl with file_name .* cat\.txt"):
        conversations(str(folder), streaming)


@BOTH
@pytest.mark.parametrize("name", ["nowhere", "nowhere.jsonl", "empty_folder"])
def test_what_is_not_there_is_refused(tmp_path, name, streaming):
    (tmp_path / "empty_folder").mkdir()
    with pytest.raises(DatasetError, match=rf"{name} cannot be loaded .* expected a file, a folder or a Hub id"):
        conversations(str(tmp_path / name), streaming)


@BOTH
def test_a_hub_id_that_is_not_there_is_refused(hub, streaming):
    with pytest.raises(DatasetError, match="org/nothing cannot be loaded"):
        conversations("org/nothing", streaming)


@BOTH
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_an_empty_dataset_is_refused(tmp_path, name, streaming):
    source = str(tmp_path / name)
    if name.endswith("jsonl"):
        Path(source).touch()
    else:
        Dataset.from_dict({"image": [png()], "text": ["a red 3"]}).select([]).to_parquet(source)
    with pytest.raises(DatasetError, match=rf"{name} has no rows; expected at least one"):
        conversations(source, streaming)


def test_a_folder_without_a_train_split_is_refused(folder):
    (folder / "test").mkdir()
    for name in ("0.png", "1.png"):
        (folder / name).rename(folder / "test" / name)
    write_rows(folder / "test" / "metadata.jsonl", [{"file_name": "1.png", "text": "a blue 7"}])
    with pytest.raises(DatasetError, match=r"has no split 'train'; it has test\. .*--split"):
        conversations(str(folder))


@BOTH
@pytest.mark.parametrize(("name", "content"), [("rows.jsonl", b"{oops"), ("rows.parquet", b"PAR1 not")])
def test_a_damaged_file_is_refused(tmp_path, name, content, streaming):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=rf"{name} cannot be loaded"):
        conversations(str(tmp_path / name), streaming)


def test_a_file_of_another_kind_is_refused(folder):
    with pytest.raises(DatasetError, match=r"0\.png ends in '\.png'; expected \.jsonl, \.json, \.parquet"):
        conversations(str(folder / "0.png"))


@given(st.data(), st.sampled_from(MODES), st.integers(1, 9), st.integers(1, 9))
def test_any_image_becomes_rgb_of_its_size_and_stays_so(data, mode, width, height):
    count = len(Image.new(mode, (width, height)).tobytes())
    image = Image.frombytes(mode, (width, height), data.draw(st.binary(min_size=count, max_size=count)))
    rgb = to_rgb(image)
    assert (rgb.mode, rgb.size) == ("RGB", (width, height))
    assert to_rgb(rgb).tobytes() == rgb.tobytes()


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(np.array([[0, 257, 65535]], np.uint16)), [0, 1, 255]),
        (Image.fromarray(np.array([[0, 255]], np.uint16)), [0, 1]),  # dark, and not taken for 8 bits
        (Image.fromarray(np.array([[0, 257, 65535]], np.int32)), [0, 1, 255]),
        (Image.fromarray(np.array([[-5, 0, 255]], np.int32)), [0, 0, 255]),
        (Image.fromarray(np.array([[0, 0.2, 1]], np.float32)), [0, 51, 255]),
        (Image.fromarray(np.array([[0, 51, 255]], np.float32)), [0, 51, 255]),
        (Image.fromarray(np.array([[np.nan, np.inf, 1]], np.float32)), [0, 0, 255]),
        (Image.fromarray(np.array([[False, True]])), [0, 255]),
    ],
    ids=["16 bits", "16 dark bits", "32 bits", "8 bits in 32", "floats to 1", "floats to 255", "not finite", "1 bit"],
)
def test_greys_of_any_depth(image, expected):
    for rgb in (to_rgb(image), saved(image, "TIFF")):
        assert np.asarray(rgb).tolist() == [[[value] * 3 for value in expected]]


def test_what_is_transparent_is_white():
    half_red = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    assert saved(half_red, "PNG").getpixel((0, 0)) == (255, 127, 127)
    palette = Image.new("P", (1, 1))
    palette.putpalette([255, 0, 0])
    assert saved(palette, "PNG").getpixel((0, 0)) == (255, 0, 0)
    assert saved(palette, "PNG", transparency=0).getpixel((0, 0)) == (255, 255, 255)
    red = Image.new("RGB", (1, 1), "red")
    assert saved(red, "PNG", transparency=(255, 0, 0)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame(file_format):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    image = saved(frames[0], file_format, save_all=True, append_images=frames[1:], lossless=True)
    assert set(image.get_flattened_data()) == {(255, 0, 0)}


def test_a_cmyk_jpeg():
    red, green, blue = saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG").getpixel((4, 4))
    assert red > 250
    assert max(green, blue) < 5


@pytest.mark.parametrize(("orientation", "turned"), [(3, Image.ROTATE_180), (6, Image.ROTATE_270), (8, Image.ROTATE_90)])
@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_an_image_is_turned_as_its_exif_says(orientation, turned, file_format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert saved(noise(), file_format, exif=exif).tobytes() == noise().transpose(turned).tobytes()
