"""Any dataset as conversations: a Hub id, a folder of images with their words, parquet, JSONL.

A row becomes {"messages": [...], "images": [...], "origin": "scans, row 7 (cat.png)", ...}, the columns of ROW; FORMS are the
columns it may come in. Images stay encoded until `samples` decodes them: as RGB, whatever a file holds.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets import Image as ImageFeature
from datasets.fingerprint import Hasher
from PIL import Image, UnidentifiedImageError
from rows.sources import IMAGE_SUFFIXES, AnyDataset, DatasetError, Source, open_source
from rows.turns import asked, continued, drawn_and_described, given, images_of, referenced, to_answer, to_draw, told
from tqdm.auto import tqdm

from uc_adapters import __version__

ROW = Features(
    {
        "messages": List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}),
        "images": List(ImageFeature(decode=False)),
        "origin": Value("string"),
        "first": Value("bool"),
        "given": Value("int32"),
        "taught": Value("bool"),
    }
)


class Form(NamedTuple):
    """Columns that rows may come in.

    Attributes:
        what: What is done with them, in words.
        conversations: Makes conversations of a row with these columns.
        whole: False where something is missing, which any other column might hold: then no other may be there.
    """

    what: str
    conversations: Callable[[dict], list[list[dict]]]
    whole: bool = True


Forms = dict[tuple[str, ...], Form]
_IMAGES = ("images",), ("image",), ()
FORMS: Forms = {
    **{
        ("messages", *images): Form("TRL's: images of user turns are read, those of assistant turns drawn", told)
        for images in _IMAGES
    },
    **{("prompt", "completion", *images): Form("TRL's: only the completion is learned", continued) for images in _IMAGES},
    **{("conversations", *images): Form("ShareGPT's from and value", told) for images in _IMAGES},
    ("image", "question", "answer"): Form("the image is read", asked),
    ("image", "text"): Form("each image is drawn from its text, and described by it", drawn_and_described),
}
REFERENCED_FORMS: Forms = {  # to score, not to train on
    ("image", "question", "answers"): Form("the image is read, and scored by several reference answers", referenced),
}
UNFINISHED_FORMS: Forms = {  # rows that lack an answer, or the image to draw
    ("image", "question"): Form("a teacher answers, where no column but these is there or named", to_answer, whole=False),
    ("text",): Form("a teacher draws the text, where no column but this is there or named", to_draw, whole=False),
}


def fingerprint_of(*parts: Any) -> str:
    """A name for datasets' cache: of a map over a model, or over what datasets cannot hash alike from run to run."""
    return blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def conversations(
    source: str,
    streaming: bool = False,
    forms: Forms | None = None,
    split: str = "train",
    columns: dict[str, str] | None = None,
) -> AnyDataset:
    """A split of a Hub id, a folder or a file as rows of ROW's columns.

    A source row is never refused here: what it lacks is None, or an empty list, and `training_rows` names it.

    Args:
        source: A Hub id, a folder, or a .jsonl, .json or .parquet file. Paths of images are relative to the folder.
        streaming: Reads rows as they are asked for, instead of all into datasets' cache.
        forms: The columns that rows may come in, those that are preferred first. Default: FORMS.
        split: Default "train", which is all that a file has.
        columns: The source's name of a column, by ours: {"text": "caption"}. Others keep their names. The form that is read has
            all of these columns.

    Returns:
        messages: Turns of {"role", "content"}, the content always a list of {"type", "text"}.
        images: {"path", "bytes"}, one of them None; None in place of a missing image.
        origin: The source, the index of the row there, and the names of its images.
        first: False where the row above was made of the same images: `image` + `text` is drawn, then described.
        given: How many turns at the start are not learned, whoever says them: those of TRL's `prompt`. Otherwise 0.
        taught: False. Distillation sets it.

    Raises:
        DatasetError: Nothing to load, no such split or column, no rows, or columns of no known form.
    """
    opened = open_source(source, split, streaming)
    names, form = _form_of(source, opened, forms or FORMS, columns or {})
    read = {name: (columns or {}).get(name, name) for name in names}
    picked = list(dict.fromkeys(read.values()))
    left = [column for column in opened.first if column not in picked]
    if left:
        tqdm.write(f"{source}: reads the columns {_listed(picked)}; leaves out {_listed(left)}.")
    dataset, folder = opened.rows.select_columns(picked), opened.folder

    def rows(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        made = {name: [] for name in ROW}
        for index, values in zip(indices, zip(*(batch[column] for column in read.values()), strict=True), strict=True):
            row = dict(zip(read, values, strict=True))
            images = [_encoded(image, folder) for image in images_of(row)]
            files = [name for image in images_of(row) if (name := _file_name(image))]
            origin = f"{source}, row {index}" + (f" ({', '.join(files)})" if files else "")
            for place, messages in enumerate(form.conversations(row)):
                for name, value in zip(ROW, (messages, images, origin, place == 0, given(row), False), strict=True):
                    made[name].append(value)
        return made

    options = {"batched": True, "batch_size": 100, "with_indices": True, "remove_columns": picked, "features": ROW}
    if streaming:
        return dataset.map(rows, **options)
    # datasets knows when a data file changes, but not when an image does that a data file names.
    paths = [*opened.files, *_paths(dataset, read, folder)]
    fingerprint = fingerprint_of(__version__, dataset._fingerprint, Hasher.hash(rows), [_stamp(path) for path in paths])
    return dataset.map(rows, **options, new_fingerprint=fingerprint, desc=f"read {source}")


def column_names(pairs: list[str] | None) -> dict[str, str]:
    """The source's names by ours, of options such as ["text=caption"].

    Raises:
        DatasetError: A pair that is none, or a name of ours that comes twice.
    """
    split = [pair.partition("=") for pair in pairs or []]
    for pair, (ours, _, theirs) in zip(pairs or [], split, strict=True):
        if not (ours and theirs) or [name for name, *_ in split].count(ours) > 1:
            raise DatasetError(f"--columns {pair}: expected each of ours once, with the dataset's name, such as text=caption.")
    return {ours: theirs for ours, _, theirs in split}


def _form_of(source: str, opened: Source, forms: Forms, columns: dict[str, str]) -> tuple[tuple[str, ...], Form]:
    """The first form whose columns are there and that has all the named ones.

    Raises:
        DatasetError: A named column that is not there, no such form, or images that it does not read.
    """
    first = opened.first
    missing = [column for column in columns.values() if column not in first]
    if missing:
        raise DatasetError(f"{source} has no column {_listed(missing)}; it has the columns {_listed(first)}. Mend --columns.")
    there = {name: name for name in first if name not in columns.values()} | columns
    for names, form in forms.items():
        if not set(columns) <= set(names) <= set(there):
            continue
        exact = set(names) in (set(there), set(columns))
        if exact or form.whole:
            if not exact and not {"image", "images"} & set(names):
                _check_that_no_images_are_lost(source, opened.rows, names, there)
            return names, form
    alike = defaultdict(list)
    for names, form in forms.items():
        alike[form.what].append(" + ".join(names))
    known = "\n  ".join(f"{', '.join(names)}: {what}" for what, names in alike.items())
    named = f" and --columns {' '.join(f'{ours}={theirs}' for ours, theirs in columns.items())}" if columns else ""
    raise DatasetError(
        f"{source} has the columns {_listed(first)}{named}; expected one of\n  {known}\n"
        "Name them, such as --columns text=caption."
    )


def _check_that_no_images_are_lost(source: str, rows: AnyDataset, names: tuple[str, ...], there: dict[str, str]) -> None:
    """Refuses words beside a column that holds images, or names of their files, in one of the first rows."""
    head = list(rows.take(100))
    for name, column in there.items():
        if name not in names and any(_is_image(row[column]) for row in head):
            alone = " ".join(f"{name}={there[name]}" for name in names)
            raise DatasetError(
                f"{source} has images in {column}, which {' + '.join(names)} would leave out. Name that column "
                f"(--columns images={column}), or name all the columns to read (--columns {alone})."
            )


def _is_image(value: Any) -> bool:
    """Whether a value, or the first of several, is an image or the name of its file."""
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, str):
        return Path(value).suffix.lower() in IMAGE_SUFFIXES
    return isinstance(value, bytes) or (isinstance(value, dict) and set(value) == {"path", "bytes"})


def _listed(names: Any) -> str:
    return ", ".join(names)


def _encoded(image: Any, folder: Path) -> dict[str, Any] | None:
    """A path, bytes or both as one of them; None where there is neither."""
    if isinstance(image, str):
        return {"path": str(folder / image), "bytes": None}
    if isinstance(image, bytes):
        return {"path": None, "bytes": image}
    if not isinstance(image, dict) or (image.get("path") is None and image.get("bytes") is None):
        return None
    if image.get("bytes") is not None:
        # Bytes keep no path: datasets would read a file of that name in the working directory instead.
        return {"path": None, "bytes": image["bytes"]}
    return {"path": image["path"] if "://" in image["path"] else str(folder / image["path"]), "bytes": None}


def _file_name(image: Any) -> str | None:
    path = image.get("path") if isinstance(image, dict) else image
    return Path(path).name if isinstance(path, str) else None


def _paths(dataset: Dataset, read: dict[str, str], folder: Path) -> list[str]:
    """Of the images that rows name by their paths."""
    column = next((read[name] for name in ("image", "images") if name in read), None)
    if column is None:
        return []
    feature = getattr(dataset.features[column], "feature", dataset.features[column])
    if isinstance(feature, (ImageFeature, dict)) or feature == Value("binary"):  # no paths written in words
        return []
    encoded = (_encoded(image, folder) for value in dataset[column] for image in images_of({"images": value}))
    return [image["path"] for image in encoded if image and image["path"]]


def _stamp(path: str | Path) -> tuple[int, int] | None:
    """Size and time of a file; None where it is missing."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):  # no file, or no name of one
        return None
    return stat.st_size, stat.st_mtime_ns


def samples(rows: AnyDataset) -> AnyDataset:
    """The same rows as a collator takes them, decoded when they are asked for; columns beside messages and images stay."""
    if isinstance(rows, IterableDataset):
        return rows.map(decoded)
    return rows.with_transform(_decoded_batch)


def _decoded_batch(batch: dict[str, list]) -> dict[str, list]:
    rows = [decoded(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
    return {name: [row[name] for row in rows] for name in batch}


def decoded(row: dict) -> dict:
    """A row with its images decoded, upright and RGB, and its parts without what they do not have."""
    made = dict(row)
    if "messages" in row:
        made["messages"] = [{**turn, "content": [_without_none(part) for part in turn["content"]]} for turn in row["messages"]]
    if "images" in row:
        made["images"] = [_decode(image) for image in row["images"]]
    return made


def _without_none(part: dict) -> dict:
    return {name: value for name, value in part.items() if value is not None}


def _decode(image: dict | None) -> Image.Image:
    if image is None:
        raise DatasetError("An image is missing; expected a path or an encoded image.")
    try:
        return to_rgb(ImageFeature().decode_example(image))  # which turns it as its EXIF says
    except UnidentifiedImageError as error:
        raise DatasetError("An image is none that PIL can read: it is empty, damaged or of another format.") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image as mode RGB: deep greys scaled to 8 bits, what is transparent on white, an animation's first frame."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        if image.mode == "La":  # PIL has no way from La to RGBA but this
            image = image.convert("LA")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """A grey of 16 or 32 bits as uint8, (H, W)."""
    depth = np.nan_to_num(np.asarray(image).astype(np.float32), posinf=0, neginf=0).clip(0)
    # Modes I and F do not say what white is: the first of the usual values that is no darker than the image.
    white = 65535 if image.mode.startswith("I;16") else next(top for top in (1, 255, 65535, depth.max()) if depth.max() <= top)
    return (depth * (255 / white)).round().astype(np.uint8)
