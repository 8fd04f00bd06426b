import re
from pathlib import Path

import numpy as np
import pytest
from checked_rows import CONTEXT, fingerprint
from datasets import Dataset, IterableDataset
from finetune_runs import say, turn, write_rows
from helpers import rng, small_config
from other_processes import run_elsewhere
from PIL import Image
from rows.conversations import DatasetError, samples
from rows.training_rows import RowCheck, training_rows
from torch.utils.data import DataLoader

from uc_adapters import UniCompressCollator

IMAGE = {"type": "image"}
BOTH = pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])


def drawn(image: str | None, text: str | None = "a red 3") -> dict:
    return {"image": image, "text": text}


def asked(*, image="good.png", question="How many digits are there?", answer="3") -> dict:
    return {"image": image, "question": question, "answer": answer}


def told(*messages: dict, images: int = 0) -> dict:
    return {"messages": list(messages), "images": ["good.png"] * images}


@pytest.fixture
def collator(short_processor):
    return UniCompressCollator(short_processor, small_config())


@pytest.fixture
def folder(tmp_path):
    """Images, good and bad."""
    image = Image.fromarray(rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    image.save(tmp_path / "good.png")
    image.save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-500])
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:-500])
    (tmp_path / "empty.png").touch()
    (tmp_path / "words.png").write_text("no image")
    return tmp_path


def check(source: str, collator: UniCompressCollator, streaming: bool = False, **options) -> list[dict]:
    return list(training_rows([source], RowCheck(collator, CONTEXT), streaming=streaming, **options))


GOOD = told(turn("user", IMAGE, say("a red 3")), turn("assistant", say("yes")), images=1)
BAD_MESSAGES = {
    "none": ({"messages": None, "images": []}, "no messages"),
    "an empty list": (told(), "no messages"),
    "no list": ({"messages": "hello", "images": []}, "no messages"),
    "no turn": ({"messages": ["hello"], "images": []}, "turn 1 has the role None; expected system, user"),
    "an unknown role": (told(turn("user", say("hi")), turn("robot", say("3"))), "turn 2 has the role 'robot'; expected system"),
    "no role": (told({"content": "hi"}), "turn 1 has the role None"),
    "no content": (told(turn("user", say("hi")), {"role": "assistant"}), r"turn 2 \(assistant\) is empty"),
    "empty content": (told(turn("user"), turn("assistant", say("3"))), r"turn 1 \(user\) is empty"),
    "an unknown part": (told(turn("user", {"type": "audio"})), r"turn 1 \(user\) has a part of type 'audio'; expected 'text'"),
    "a part that is none": (told({"role": "user", "content": [3]}), "part of type None"),
    "empty text": (told(turn("user", IMAGE, say(" ")), turn("assistant", say("3")), images=1), "empty, missing or no string"),
    "no text": (told(turn("user", {"type": "text"}), turn("assistant", say("3"))), "empty, missing or no string"),
    "the image token in a text": (
        told(turn("user", say("<image_placeholder> hi")), turn("assistant", say("3")), images=1),
        r"turn 1 \(user\) has the image token <image_placeholder> in its text; expected a part",
    ),
    "an image in a system turn": (
        told(turn("system", IMAGE), turn("user", say("hi")), turn("assistant", say("3")), images=1),
        r"turn 1 \(system\) holds an image; expected images to read in user turns",
    ),
    "an image in a tool turn": (
        told(turn("user", say("hi")), turn("tool", IMAGE), turn("assistant", say("3")), images=1),
        r"turn 2 \(tool\) holds an image",
    ),
    "more images than parts": (
        told(turn("user", IMAGE, say("hi")), turn("assistant", say("3")), images=2),
        r"2 image\(s\) for 1 image part",
    ),
    "fewer images than parts": (
        told(turn("user", IMAGE, say("hi")), turn("assistant", say("3"))),
        r"0 image\(s\) for 1 image part",
    ),
    "nothing to learn": (told(turn("user", IMAGE, say("hi")), images=1), "Nothing to learn; expected an assistant turn"),
    "too long": (told(turn("user", say("red " * 200)), turn("assistant", say("3"))), r"\d{3} tokens, where the base takes 100"),
}
BAD_IMAGES = {
    "null": (None, "An image is missing"),
    "a missing file": ("nowhere.png", "No such file .*nowhere.png"),
    "an empty file": ("empty.png", "PIL cannot read an image"),
    "another file": ("words.png", "PIL cannot read an image"),
    "a cut JPEG": ("cut.jpg", "truncated"),
    "a cut PNG": ("cut.png", "truncated"),
    "a folder": ("", "Is a directory"),
}


@BOTH
@pytest.mark.parametrize(("row", "problem"), BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_bad_messages_stop_the_run_by_name(folder, collator, row, problem, streaming):
    source = write_rows(folder / "rows.jsonl", [GOOD, row])
    with pytest.raises(DatasetError, match=rf"--skip_bad_rows true:\n  {source}, row 1.*: .*{problem}"):
        check(source, collator, streaming)


@BOTH
@pytest.mark.parametrize(("image", "problem"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_bad_images_stop_the_run_by_name(folder, collator, image, problem, streaming):
    source = write_rows(folder / "rows.jsonl", [asked(), asked(image=image)])
    named = rf" \({image}\)" if image else ".*"
    with pytest.raises(DatasetError, match=rf"--skip_bad_rows true:\n  {source}, row 1{named}: .*{problem}"):
        check(source, collator, streaming)


@BOTH
@pytest.mark.parametrize(
    "row", [asked(answer=None), asked(answer=" "), asked(answer=["3", "4"]), asked(answer=True), asked(question=None)], ids=str
)
def test_questions_and_answers_without_words_are_bad(folder, collator, row, streaming):
    source = write_rows(folder / "rows.jsonl", [asked(), row])
    with pytest.raises(DatasetError, match=r"row 1 \(good\.png\): turn [12] .* has a text that is empty, missing or no string"):
        check(source, collator, streaming)


@BOTH
def test_a_file_that_metadata_names_and_that_is_not_there(folder, collator, streaming):
    rows = [{"file_name": "good.png", "text": "a red 3"}, {"file_name": "nowhere.png", "text": "a blue 7"}]
    write_rows(folder / "metadata.jsonl", rows)
    with pytest.raises(DatasetError, match=r"row 1 \(nowhere\.png\): FileNotFoundError"):
        check(str(folder), collator, streaming)


def test_all_bad_rows_are_counted_and_the_first_ones_named(folder, collator):
    source = write_rows(folder / "rows.jsonl", [drawn("good.png"), *[drawn("nowhere.png")] * 12])
    with pytest.raises(DatasetError, match=r"(?s)12 bad row\(s\) in .*row 10 \(nowhere\.png\)[^\n]*\n  and 2 more$"):
        check(source, collator)


@BOTH
def test_skipped_rows_are_named_and_counted(folder, collator, capsys, streaming):
    source = write_rows(folder / "rows.jsonl", [drawn("nowhere.png"), drawn("good.png"), drawn("cut.jpg")])
    rows = check(source, collator, streaming, skip_bad_rows=True)
    assert [row["origin"] for row in rows] == [f"{source}, row 1 (good.png)"] * 2
    told = capsys.readouterr().out
    assert f"2 bad row(s) in {source} skipped" in told
    assert re.search(r"row 0 \(nowhere\.png\).*: FileNotFoundError", told)
    assert re.search(r"row 2 \(cut\.jpg\).*: OSError", told)


def test_skipped_rows_are_counted_when_a_pass_is_left_early(folder, collator, capsys):
    source = write_rows(folder / "rows.jsonl", [drawn("nowhere.png"), drawn("good.png"), drawn("good.png")])
    rows = iter(training_rows([source], RowCheck(collator, CONTEXT), streaming=True, skip_bad_rows=True))
    next(rows)
    del rows
    assert f"1 bad row(s) in {source} skipped" in capsys.readouterr().out


@BOTH
def test_what_is_made_of_one_row_is_kept_or_left_out_together(folder, collator, streaming):
    longest = "red " * (CONTEXT - 32)  # short enough to be drawn; with the request to describe it, too long
    source = write_rows(folder / "rows.jsonl", [drawn("good.png", longest), drawn("good.png")])
    with pytest.raises(DatasetError, match=r"row 0 \(good\.png\): 10\d tokens, where the base takes 100"):
        check(source, collator, streaming)
    rows = check(source, collator, streaming, skip_bad_rows=True)
    assert [(row["first"], row["origin"]) for row in rows] == [
        (True, f"{source}, row 1 (good.png)"),
        (False, rows[0]["origin"]),
    ]


@BOTH
def test_a_dataset_of_bad_rows_only_is_refused(folder, collator, streaming):
    source = write_rows(folder / "rows.jsonl", [drawn("nowhere.png")] * 2)
    with pytest.raises(DatasetError, match=r"2 bad row\(s\) in .*, and no good one; expected at least one"):
        check(source, collator, streaming, skip_bad_rows=True)


@BOTH
def test_images_of_later_user_turns_and_of_any_kind_are_good(folder, collator, streaming):
    image = Image.open(folder / "good.png")
    image.convert("L").save(folder / "grey.png")
    image.convert("RGBA").save(folder / "rgba.png")
    image.convert("P").save(folder / "palette.gif", save_all=True, append_images=[image.convert("P")])
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("1").save(folder / "bit.png")
    Image.fromarray(np.ones((4, 4), np.uint16)).save(folder / "deep.png")
    Image.fromarray(np.ones((4, 4), np.float32)).save(folder / "float.tiff")
    image.resize((1, 1)).save(folder / "pixel.png")
    names = ["grey.png", "rgba.png", "palette.gif", "cmyk.jpg", "bit.png", "deep.png", "float.tiff", "pixel.png"]
    first, *later = [[turn("user", IMAGE, say("hi")), turn("assistant", say("3"))] for _ in names]
    source = write_rows(folder / "rows.jsonl", [{"messages": sum(later, first), "images": names}])
    rows = training_rows([source], RowCheck(collator, 1000), streaming=streaming)
    assert collator(list(samples(rows)))["pixel_values"].shape == (len(names), 3, 64, 64)


def test_a_hundred_megapixels_are_good_and_twice_as_many_are_bad_by_name(folder, collator):
    for name, height in (("hundred.png", 10_000), ("more.png", 20_000)):
        Image.new("1", (10_000, height)).save(folder / name)
    with pytest.warns(Image.DecompressionBombWarning):
        assert len(check(write_rows(folder / "rows.jsonl", [asked(image="hundred.png")]), collator)) == 1
    source = write_rows(folder / "rows.jsonl", [asked(image="more.png")])
    with pytest.raises(DatasetError, match=r"row 0 \(more\.png\): DecompressionBombError"):
        check(source, collator)


@BOTH
def test_rows_are_still_encoded_and_make_batches_once_they_are_decoded(folder, collator, streaming):
    source = write_rows(folder / "rows.jsonl", [drawn("good.png"), drawn("whole.jpg", "a blue 7")])
    rows = training_rows([source], RowCheck(collator, CONTEXT), streaming=streaming)
    assert next(iter(rows))["images"] == [{"path": str(folder / "good.png"), "bytes": None}]
    (batch,) = DataLoader(samples(rows), batch_size=4, collate_fn=collator)
    assert len(batch["input_ids"]) == 4
    assert len(batch["pixel_values"]) == len(batch["gen_pixel_values"]) == 2


def mixture(folder, collator, streaming=False, **options) -> list[str]:
    """The source of each row of a short and a long one."""
    row = told(turn("user", say("hi")), turn("assistant", say("3")))
    short, long = (write_rows(folder / f"{name}.jsonl", [row] * count) for name, count in (("short", 4), ("long", 30)))
    rows = training_rows([short, long], RowCheck(collator, CONTEXT), streaming=streaming, **options)
    return [Path(row["origin"].split(",")[0]).stem for row in rows]


@BOTH
def test_without_weights_every_row_comes_once(folder, collator, streaming):
    assert mixture(folder, collator, streaming) == ["short"] * 4 + ["long"] * 30


@BOTH
def test_weights_are_shares_of_the_mixture_and_shorter_sources_repeat(folder, collator, streaming):
    sources = mixture(folder, collator, streaming, weights=[1, 1])
    assert 0.3 < sources.count("short") / len(sources) < 0.7
    assert sources.count("long") >= 30
    assert sources == mixture(folder, collator, streaming, weights=[2, 2])
    assert sources != mixture(folder, collator, streaming, weights=[1, 1], seed=1)


@BOTH
@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -1], [1, float("nan")]], ids=str)
def test_weights_that_are_none_are_refused(collator, weights, streaming):
    with pytest.raises(DatasetError, match=r"weights .* for 2 dataset\(s\); expected one for each, all above 0"):
        training_rows(["a", "b"], RowCheck(collator, CONTEXT), weights=weights, streaming=streaming)


def test_no_dataset_is_refused(collator):
    with pytest.raises(DatasetError, match="expected at least one"):
        training_rows([], RowCheck(collator, CONTEXT))


def test_columns_are_added_to_each_source_behind_its_check(folder, collator):
    sources = [
        write_rows(folder / f"{name}.jsonl", [drawn("nowhere.png"), *[drawn("good.png")] * count])
        for name, count in (("a", 1), ("b", 2))
    ]

    def encode(dataset: Dataset) -> Dataset:
        return dataset.map(lambda row: {"latents": [float(len(dataset))]})

    rows = samples(training_rows(sources, RowCheck(collator, CONTEXT), skip_bad_rows=True, encode=encode))
    assert [row["latents"] for row in rows] == [[2.0]] * 2 + [[4.0]] * 4
    with pytest.raises(DatasetError, match="streaming with fill_in, encode or part"):
        training_rows(sources, RowCheck(collator, CONTEXT), streaming=True, encode=encode)


def test_the_collator_is_left_as_it_was(folder, short_processor):
    dropping = UniCompressCollator(short_processor, small_config(), caption_dropout=1.0)
    check(write_rows(folder / "rows.jsonl", [drawn("good.png")]), dropping)
    assert dropping.caption_dropout == 1.0


def test_streams_are_read_shard_by_shard_by_several_workers(folder, collator):
    image = {"path": "good.png", "bytes": (folder / "good.png").read_bytes()}
    (folder / "shards").mkdir()
    for shard in range(2):
        rows = {"image": [image] * 2, "question": ["hi"] * 2, "answer": ["3", "4" if shard == 0 else None]}
        Dataset.from_dict(rows).to_parquet(folder / "shards" / f"train-{shard}.parquet")
    source = str(folder / "shards")
    rows = training_rows([source], RowCheck(collator, CONTEXT), streaming=True, skip_bad_rows=True)
    assert isinstance(rows, IterableDataset)
    assert len(list(DataLoader(samples(rows), batch_size=1, collate_fn=collator, num_workers=2))) == 3
    with pytest.raises(DatasetError, match=r"row 1 \(good\.png\), shard 2 of 2: turn 2"):
        check(source, collator, streaming=True)


def test_another_process_does_not_check_again(folder, collator):
    source = write_rows(folder / "rows.jsonl", [asked()] * 3)
    dataset = training_rows([source], RowCheck(collator, CONTEXT))
    cache = Path(dataset.cache_files[0]["filename"]).parent
    before = {file.name: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert run_elsewhere(fingerprint, source) == dataset._fingerprint
    assert {file.name: file.stat().st_mtime_ns for file in cache.iterdir()} == before


def test_rows_are_checked_again_where_the_verdict_may_be_another(folder, collator, short_processor):
    source = write_rows(folder / "rows.jsonl", [asked()])
    cache = Path(training_rows([source], RowCheck(collator, CONTEXT)).cache_files[0]["filename"]).parent
    count = len(list(cache.iterdir()))
    with pytest.raises(DatasetError, match="where the base takes 10"):
        training_rows([source], RowCheck(collator, 10))
    training_rows([source], RowCheck(UniCompressCollator(short_processor, small_config(num_global_tokens=3)), CONTEXT))
    training_rows([source], RowCheck(UniCompressCollator(short_processor, small_config(decompressor="phase")), CONTEXT))
    assert len(list(cache.iterdir())) == count + 3


def test_a_mended_image_is_good(folder, collator):
    source = write_rows(folder / "rows.jsonl", [asked(image="cut.jpg")])
    with pytest.raises(DatasetError, match="truncated"):
        check(source, collator)
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes())
    assert len(check(source, collator)) == 1


def test_a_mended_image_of_a_folder_is_good(folder, collator):
    write_rows(folder / "metadata.jsonl", [{"file_name": "cut.jpg", "text": "a red 3"}])
    with pytest.raises(DatasetError, match="truncated"):
        check(str(folder), collator)
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes())
    assert len(check(str(folder), collator)) == 2
