import json
from pathlib import Path

import pytest
from datasets import Dataset
from finetune_runs import say, turn, write_rows
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from rows.conversations import DatasetError, conversations, samples
from rows.sources import open_source

BOTH = pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"]
PATTERNS = ["test [1]", "dev?", "eval*", "{train}"]


def write(file: Path, colour: str = "red") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(file)
    return file


def write_with_caption(file: Path) -> Path:
    """An image whose caption is the name of its file."""
    write(file).with_suffix(".txt").write_text(file.stem, encoding="utf-8")
    return file


def captions(folder: Path, streaming: bool = False, **options) -> list[tuple[str, str | None]]:
    """What the rows of a folder say: the name of an image, and the words to it."""
    rows = [row for row in conversations(str(folder), streaming, **options) if row["first"]]
    return [(Path(row["images"][0]["path"]).name, row["messages"][0]["content"][0]["text"]) for row in rows]


@BOTH
def test_captions_beside_images(tmp_path, streaming):
    write_with_caption(tmp_path / "a red 3.png")
    write_with_caption(tmp_path / "below" / "a blue 7.JPG")
    write(tmp_path / "__pycache__" / "no.png")
    write(tmp_path / ".hidden" / "no.png")
    (tmp_path / "notes.txt").write_text("no caption")
    assert captions(tmp_path, streaming) == [("a red 3.png", "a red 3"), ("a blue 7.JPG", "a blue 7")]
    drawn, described = list(samples(conversations(str(tmp_path), streaming)))[:2]
    assert drawn["messages"] == [turn("user", say("a red 3")), turn("assistant", {"type": "image"})]
    assert described["messages"][1] == turn("assistant", say("a red 3"))
    assert drawn["images"][0].getpixel((0, 0)) == (255, 0, 0)
    assert drawn["origin"] == f"{tmp_path}, row 0 (a red 3.png)"


@BOTH
def test_an_image_whose_caption_is_missing_or_no_text_is_a_bad_row(tmp_path, streaming):
    write_with_caption(tmp_path / "good.png")
    write(tmp_path / "missing.png")
    write(tmp_path / "other.png").with_suffix(".txt").write_bytes(b"\xff\xfe\x00")
    write(tmp_path / "mark.png").with_suffix(".txt").write_bytes("\ufeffa caption\r\n".encode())
    said = {"good.png": "good", "missing.png": None, "other.png": None, "mark.png": "a caption"}
    assert dict(captions(tmp_path, streaming)) == said


def test_captions_and_images_that_change_are_read_again(tmp_path):
    image = write_with_caption(tmp_path / "0.png")
    first = conversations(str(tmp_path))
    assert conversations(str(tmp_path))._fingerprint == first._fingerprint
    image.with_suffix(".txt").write_text("another")
    second = conversations(str(tmp_path))
    assert second[0]["messages"][0]["content"][0]["text"] == "another"
    write(image, "blue").touch()
    assert len({first._fingerprint, second._fingerprint, conversations(str(tmp_path))._fingerprint}) == 3


WORDS = ["train", "test", "eval", "dev", "validation", "val", "testing", "cat", "猫", "é", "1", "a.b", "[0]", "x*", "q?"]
NAMES = st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map("_".join)
FOLDERS = st.sampled_from(["", "cats", "hundé/one", "below [2]", "three/deep/er"])


@given(st.sets(st.tuples(FOLDERS, NAMES), min_size=1, max_size=6), st.booleans(), st.booleans())
@example({("", name) for name in PATTERNS}, True, False)
@settings(max_examples=30)
def test_no_name_of_an_image_makes_a_split(tmp_path_factory, images, streaming, with_metadata):
    folder = tmp_path_factory.mktemp("images")
    for number, (below, name) in enumerate(sorted(images)):
        file = write_with_caption(folder / below / f"{name}.png")
        mode = MODES[number]
        Image.new(mode, (4, 4)).save(file, "TIFF" if mode in ("CMYK", "F") else "PNG")
    if with_metadata:
        lines = [{"file_name": f"{below}/{name}.png".lstrip("/"), "text": name} for below, name in images]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    rows = captions(folder, streaming)
    assert sorted(rows) == sorted((f"{name}.png", name) for _, name in images)
    assert len(list(samples(conversations(str(folder), streaming)))) == 2 * len(images)


def metadata(folder: Path, kind: str, name: str, text: str) -> None:
    """A metadata file of one row, and its image."""
    write(folder / name)
    if kind == "jsonl":
        write_rows(folder / "metadata.jsonl", [{"file_name": name, "text": text}])
    elif kind == "csv":
        (folder / "metadata.csv").write_text(f"file_name,text\n{name},{text}\n")
    else:
        (folder / name).with_suffix(".txt").write_text(text)


@BOTH
@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (("train", "test", "validation"), ("train", "test", "validation")),
        (("Train/cats", "Test/cats"), ("train", "test")),
        (("images/train2017", "images/val2017"), ("train", "validation")),
        (("train/test",), ("train",)),
    ],
    ids=str,
)
def test_folders_named_like_splits_are_splits(tmp_path, folders, splits, kind, streaming):
    for folder, split in zip(folders, splits, strict=True):
        metadata(tmp_path / folder, kind, f"test_of_{split}.png", split)
    for split in splits:
        assert captions(tmp_path, streaming, split=split) == [(f"test_of_{split}.png", split)]
    with pytest.raises(DatasetError, match=rf"has no split 'dev'; it has [a-z, ]*{splits[0]}.*--split"):
        conversations(str(tmp_path), streaming, split="dev")


@BOTH
@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
def test_a_folder_named_like_a_split_beside_others_is_refused(tmp_path, kind, streaming):
    metadata(tmp_path / "train", kind, "0.png", "a train")
    metadata(tmp_path / "bus", kind, "1.png", "a bus")
    with pytest.raises(DatasetError, match=r"named like splits \(train/\) and elsewhere \(bus/\).*Rename"):
        conversations(str(tmp_path), streaming)


@BOTH
def test_metadata_above_folders_named_like_splits_is_refused(tmp_path, streaming):
    write(tmp_path / "train" / "0.png")
    write_rows(tmp_path / "metadata.jsonl", [{"file_name": "train/0.png", "text": "a"}])
    with pytest.raises(DatasetError, match=r"elsewhere \(metadata\.jsonl\)"):
        conversations(str(tmp_path), streaming)


@BOTH
def test_splits_that_a_card_names_are_those_of_a_folder_of_images(tmp_path, streaming):
    for name in ("a", "b"):
        metadata(tmp_path / name, "jsonl", "0.png", name)
    splits = "".join(f"  - split: {split}\n    path: {name}/*\n" for split, name in (("train", "a"), ("dev", "b")))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{splits}---\n")
    assert captions(tmp_path, streaming, split="dev") == [("0.png", "b")]
    (tmp_path / "README.md").write_text("---\n- no card\n---\n")
    assert sorted(captions(tmp_path, streaming)) == [("0.png", "a"), ("0.png", "b")]


@BOTH
def test_a_split_without_words_is_refused(tmp_path, streaming):
    metadata(tmp_path / "train", "jsonl", "0.png", "a")
    write(tmp_path / "test" / "1.png")
    with pytest.raises(
        DatasetError, match=r"1 image\(s\) and no texts for them in its split 'test'; expected a metadata\.jsonl"
    ):
        conversations(str(tmp_path), streaming, split="test")


@BOTH
@pytest.mark.parametrize(("name", "content"), [("metadata.jsonl", ""), ("metadata.csv", "file_name,text\n")])
def test_metadata_without_rows_is_refused(tmp_path, name, content, streaming):
    write(tmp_path / "0.png")
    (tmp_path / name).write_text(content)
    with pytest.raises(DatasetError, match=r"has no rows; expected at least one in its split 'train'"):
        conversations(str(tmp_path), streaming)


@BOTH
def test_images_beside_a_file_with_their_rows(tmp_path, streaming):
    for name in "ab":
        write(tmp_path / "images" / f"{name}.png")
    row = {"image": "images/a.png", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    (tmp_path / "llava.json").write_text(json.dumps([row]))
    with pytest.raises(DatasetError, match=r"2 image\(s\) and no texts.*If the rows are in llava\.json, pass that file"):
        conversations(str(tmp_path), streaming)
    (made,) = samples(conversations(str(tmp_path / "llava.json"), streaming))
    assert [part["type"] for part in made["messages"][0]["content"]] == ["image", "text"]
    assert made["images"][0].size == (4, 4)


@BOTH
def test_what_is_left_out_of_a_folder_of_images_is_said(tmp_path, streaming, capsys):
    metadata(tmp_path, "jsonl", "a.png", "a")
    write_with_caption(tmp_path / "b.png")
    (tmp_path / "more.json").write_text("[]")
    assert captions(tmp_path, streaming) == [("a.png", "a")]
    said = capsys.readouterr().out
    assert "reads its images with metadata.jsonl; leaves out more.json, .txt files." in said
    assert ("1 of 2 images are in no metadata file: left out (b.png)" in said) != streaming  # a stream is not read for it


@BOTH
@pytest.mark.parametrize("name", ["train.parquet", "data/train-00000-of-00001.parquet", "rows.jsonl"])
def test_folders_of_data_files_stay_as_datasets_reads_them(tmp_path, name, streaming):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    rows = Dataset.from_dict({"text": ["a", "b"]})
    rows.to_parquet(tmp_path / name) if name.endswith("parquet") else rows.to_json(tmp_path / name)
    write(tmp_path / "thumbnail.png")
    source = open_source(str(tmp_path), "train", streaming)
    assert (len(list(source.rows)), source.first) == (2, {"text": "a"})
    with pytest.raises(DatasetError, match=r"has no split 'test'; it has train\. Choose"):
        open_source(str(tmp_path), "test", streaming)


@BOTH
def test_a_split_is_chosen_and_an_empty_one_refused(tmp_path, streaming):
    for split, rows in (("train", [{"text": "a"}]), ("test", [{"text": "b"}]), ("validation", [])):
        write_rows(tmp_path / f"{split}.jsonl", rows)
    assert open_source(str(tmp_path), "test", streaming).first == {"text": "b"}
    with pytest.raises(DatasetError, match=r"has no rows; expected at least one in its split 'validation'"):
        open_source(str(tmp_path), "validation", streaming)
    with pytest.raises(DatasetError, match=r"train\.jsonl has no split 'test'; it has train"):
        open_source(str(tmp_path / "train.jsonl"), "test", streaming)
