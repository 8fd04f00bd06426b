"""Reads any dataset as conversations: a Hub id, a folder of images with texts, parquet, JSONL.

A row becomes {"messages": [...], "images": [...], "origin": "scans, row 7 (cat.png)", ...}, with the columns of ROW. FORMS
lists the columns that a source may have. Images stay encoded until `samples` decodes them, to RGB whatever a file holds.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, Features, IterableDataset, List, Value
from datasets import Image as ImageFeature
from datasets.fingerprint import Hasher
from PIL import Image, UnidentifiedImageError
from rows.sources import IMAGE_SUFFIXES, AnyDataset, DatasetError, Source, open_source
from rows.turns import asked, continued, drawn_and_described, given, images_of, referenced, to_answer, to_draw, told
from tqdm.auto import tqdm

from uc_adapters import __version__
from uc_adapters.pictures import to_rgb

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
    """The columns that the rows of a source may have.

    Attributes:
        what: What is done with them, as text for an error message.
        conversations: Makes the conversations of a row with these columns.
        whole: False if something is missing that any other column might hold. Then there may be no other column.
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
    **{("conversations", *images): Form("ShareGPT's turns of from and value", told) for images in _IMAGES},
    ("image", "question", "answer"): Form("the image is read", asked),
    ("image", "text"): Form("each image is drawn from its text, and described by it", drawn_and_described),
}
REFERENCED_FORMS: Forms = {  # to score, not to train on
    ("image", "question", "answers"): Form("the image is read, and the answer is scored by several references", referenced),
}
UNFINISHED_FORMS: Forms = {  # rows that lack an answer, or the image to draw
    ("image", "question"): Form("a teacher answers, if these are the only columns there or named", to_answer, whole=False),
    ("text",): Form("a teacher draws the text, if this is the only column there or named", to_draw, whole=False),
}


def fingerprint_of(*parts: Any) -> str:
    """A name in datasets' cache for a map over a model, or over anything that datasets hashes differently in each run."""
    return blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def conversations(
    source: str,
    streaming: bool = False,
    forms: Forms | None = None,
    split: str = "train",
    columns: dict[str, str] | None = None,
    labels: Sequence[str] = (),
) -> AnyDataset:
    """Opens a split of a Hub id, a folder or a file as rows with the columns of ROW.

    A bad row is not refused here: what it lacks becomes None or an empty list, and `training_rows` names the row.

    Args:
        source: A Hub id, a folder, or a .jsonl, .json or .parquet file. Paths of images are relative to
            the folder.
        streaming: Reads rows when they are asked for, instead of all of them into datasets' cache.
        forms: The columns that rows may have, with the preferred ones first. Default: FORMS.
        split: The split. Default "train", the only one that a file has.
        columns: The source's column for each of our names: {"text": "caption"}. Other columns keep their names. The form that
            is read has all of these columns.
        labels: Further columns of the source, which stay beside those of ROW, as texts.

    Returns:
        messages: Turns of {"role", "content"}, the content always a list of {"type", "text"}.
        images: A {"path", "bytes"} for each, one of the two None; None in place of a missing image.
        origin: The source, the index of the row there, and the names of its images.
        first: False if the row before was made of the same images: `image` + `text` is drawn, then described.
        given: How many turns at the start are not learned, of any role: those of TRL's `prompt`. Otherwise 0.
        taught: False. Distillation sets it.

    Raises:
        DatasetError: There is nothing to load, no such split or column, no row, or the columns are of no known form.
    """
    opened = open_source(source, split, streaming)
    _check_labels(source, opened.first, labels)
    names, form = _form_of(source, opened, forms or FORMS, columns or {})
    read = {name: (columns or {}).get(name, name) for name in names}
    picked = list(dict.fromkeys([*read.values(), *labels]))
    unread = [column for column in opened.first if column not in picked]
    if unread:
        tqdm.write(f"{source}: reads the columns {_listed(picked)}; leaves out {_listed(unread)}.")
    dataset, folder = opened.rows.select_columns(picked), opened.folder
    features = Features({**ROW, **{label: Value("string") for label in labels}})

    def rows(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        made = {name: [] for name in features}
        for index, values in zip(indices, zip(*(batch[column] for column in picked), strict=True), strict=True):
            source_row = dict(zip(picked, values, strict=True))
            row = {name: source_row[column] for name, column in read.items()}
            images = [_encoded(image, folder) for image in images_of(row)]
            files = [name for image in images_of(row) if (name := _file_name(image))]
            origin = f"{source}, row {index}" + (f" ({', '.join(files)})" if files else "")
            for number, messages in enumerate(form.conversations(row)):
                for name, value in zip(ROW, (messages, images, origin, number == 0, given(row), False), strict=True):
                    made[name].append(value)
                for label in labels:
                    made[label].append(None if source_row[label] is None else str(source_row[label]))
        return made

    options = {"batched": True, "batch_size": 100, "with_indices": True, "remove_columns": picked, "features": features}
    if streaming:
        return dataset.map(rows, **options)
    # datasets notices a changed data file, but not a changed image that a data file names.
    paths = [*opened.files, *_paths(dataset, read, folder)]
    fingerprint = fingerprint_of(__version__, dataset._fingerprint, Hasher.hash(rows), [_stamp(path) for path in paths])
    return dataset.map(rows, **options, new_fingerprint=fingerprint, desc=f"read {source}")


def _check_labels(source: str, first: dict, labels: Sequence[str]) -> None:
    missing = [label for label in labels if label not in first]
    if missing:
        raise DatasetError(f"{source} has no column {_listed(missing)}; it has the columns {_listed(first)}. Change --labels.")
    if len(set(labels)) < len(labels):
        raise DatasetError(f"--labels {' '.join(labels)}: expected each column once.")
    taken = [label for label in labels if label in ROW]
    if taken:
        raise DatasetError(
            f"{source}: a label cannot be in a column called {_listed(taken)}; expected another name. Rename it."
        )


def column_names(pairs: list[str] | None) -> dict[str, str]:
    """Parses options such as ["text=caption"] into {ours: theirs}.

    Raises:
        DatasetError: An option is not such a pair, or one of our names comes twice.
    """
    split = [pair.partition("=") for pair in pairs or []]
    for pair, (ours, _, theirs) in zip(pairs or [], split, strict=True):
        if not (ours and theirs) or [name for name, *_ in split].count(ours) > 1:
            raise DatasetError(f"--columns {pair}: expected OURS=THEIRS, with each of our names once, such as text=caption.")
    return {ours: theirs for ours, _, theirs in split}


def _form_of(source: str, opened: Source, forms: Forms, columns: dict[str, str]) -> tuple[tuple[str, ...], Form]:
    """The first form whose columns the source has and that has all the columns of --columns.

    Raises:
        DatasetError: A named column is missing, no form fits, or the form would leave images out.
    """
    first = opened.first
    missing = [column for column in columns.values() if column not in first]
    if missing:
        raise DatasetError(f"{source} has no column {_listed(missing)}; it has the columns {_listed(first)}. Change --columns.")
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
        "Name the columns to read, such as --columns text=caption."
    )


def _check_that_no_images_are_lost(source: str, rows: AnyDataset, names: tuple[str, ...], there: dict[str, str]) -> None:
    """Refuses a form without images if another column has images, or names of their files, in one of the first rows."""
    head = list(rows.take(100))
    for name, column in there.items():
        if name not in names and any(_is_image(row[column]) for row in head):
            alone = " ".join(f"{name}={there[name]}" for name in names)
            raise DatasetError(
                f"{source} has images in {column}, which {' + '.join(names)} would leave out. Name that column "
                f"(--columns images={column}), or name all the columns to read (--columns {alone})."
            )


def _is_image(value: Any) -> bool:
    """Whether a value, or the first value of a list, is an image or the name of an image file."""
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, str):
        return Path(value).suffix.lower() in IMAGE_SUFFIXES
    return isinstance(value, bytes) or (isinstance(value, dict) and set(value) == {"path", "bytes"})


def _listed(names: Any) -> str:
    return ", ".join(names)


def _encoded(image: Any, folder: Path) -> dict[str, Any] | None:
    """A path, bytes or both as {"path", "bytes"} with one of them None; None if there is neither."""
    if isinstance(image, str):
        return {"path": str(folder / image), "bytes": None}
    if isinstance(image, bytes):
        return {"path": None, "bytes": image}
    if not isinstance(image, dict) or (image.get("path") is None and image.get("bytes") is None):
        return None
    if image.get("bytes") is not None:
        # The path is dropped, because datasets would read a file of that name in the working directory instead.
        return {"path": None, "bytes": image["bytes"]}
    return {"path": image["path"] if "://" in image["path"] else str(folder / image["path"]), "bytes": None}


def _file_name(image: Any) -> str | None:
    path = image.get("path") if isinstance(image, dict) else image
    return Path(path).name if isinstance(path, str) else None


def _paths(dataset: Dataset, read: dict[str, str], folder: Path) -> list[str]:
    """The paths of the images that rows name by path."""
    column = next((read[name] for name in ("image", "images") if name in read), None)
    if column is None:
        return []
    feature = getattr(dataset.features[column], "feature", dataset.features[column])
    if isinstance(feature, (ImageFeature, dict)) or feature == Value("binary"):  # no paths as text
        return []
    encoded = (_encoded(image, folder) for value in dataset[column] for image in images_of({"images": value}))
    return [image["path"] for image in encoded if image and image["path"]]


def _stamp(path: str | Path) -> tuple[int, int] | None:
    """Size and modification time of a file; None if it is missing."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):  # no such file, or not a valid name
        return None
    return stat.st_size, stat.st_mtime_ns


def samples(rows: AnyDataset) -> AnyDataset:
    """The same rows as a collator takes them: decoded when they are asked for. Columns beside messages and images stay."""
    if isinstance(rows, IterableDataset):
        return rows.map(decoded)
    return rows.with_transform(_decoded_batch)


def _decoded_batch(batch: dict[str, list]) -> dict[str, list]:
    rows = [decoded(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
    return {name: [row[name] for row in rows] for name in batch}


def decoded(row: dict) -> dict:
    """A row with its images decoded, upright and RGB, and its parts without the fields that are None."""
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
        return to_rgb(ImageFeature().decode_example(image))  # decode_example applies the EXIF rotation
    except UnidentifiedImageError as error:
        raise DatasetError("PIL cannot read an image: its file is empty, damaged or of another format.") from error
