"""Any dataset as conversations: a Hub id, a folder of images with metadata.jsonl, parquet, JSONL.

A row becomes {"messages": [...], "images": [...], "origin": "scans, row 7 (cat.png)", "first": True}; FORMS are the columns
it may come in. Images stay encoded until `samples` decodes them: as RGB, whatever a file holds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value, load_dataset
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetsError
from datasets.fingerprint import Hasher
from PIL import Image, UnidentifiedImageError

AnyDataset = Dataset | IterableDataset
CAPTION_REQUEST = "Describe the image."
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
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def fingerprint_of(*parts: Any) -> str:
    """A name for datasets' cache: of a map over a model, or over what datasets cannot hash alike from run to run."""
    return blake2b(repr(parts).encode(), digest_size=8).hexdigest()


class DatasetError(ValueError):
    """A dataset that cannot be trained on; says what was found, what was expected, and what to do."""


def conversations(source: str, streaming: bool = False, forms: Forms | None = None, split: str = "train") -> AnyDataset:
    """A split of a Hub id, a folder or a file as rows of ROW's columns.

    A source row is never refused here: what it lacks is None, or an empty list, and `training_rows` names it.

    Args:
        source: A Hub id, a folder, or a .jsonl, .json or .parquet file. Paths of images are relative to the folder.
        streaming: Reads rows as they are asked for, instead of all into datasets' cache.
        forms: The columns that rows may come in, those that are preferred first. Default: FORMS.
        split: Default "train", which is all that a file has.

    Returns:
        messages: Turns of {"role", "content"}, the content always a list of {"type", "text"}.
        images: {"path", "bytes"}, one of them None; None in place of a missing image.
        origin: The source, the index of the row there, and the names of its images.
        first: False where the row above was made of the same images: `image` + `text` is drawn, then described.

    Raises:
        DatasetError: Nothing to load, no rows, or columns of no known form.
    """
    dataset, columns = _open(source, streaming, split)
    known = forms or FORMS
    form = next((form for form in known if set(form) <= set(columns)), None)
    if form is None:
        expected = "; ".join(f"{' + '.join(form)} ({what})" for form, (what, _) in known.items())
        raise DatasetError(
            f"{source} has the columns {', '.join(columns)}; expected one of: {expected}. Rename them; a folder of images "
            "needs a metadata.jsonl with file_name (it becomes image) or file_names (images)."
        )
    dataset = dataset.select_columns(list(form))
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    tell = known[form][1]

    def rows(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        made = {name: [] for name in ROW}
        for index, values in zip(indices, zip(*(batch[name] for name in form), strict=True), strict=True):
            row = dict(zip(form, values, strict=True))
            images = [_encoded(image, folder) for image in _images(row)]
            files = [name for image in _images(row) if (name := _file_name(image))]
            origin = f"{source}, row {index}" + (f" ({', '.join(files)})" if files else "")
            for place, messages in enumerate(tell(row)):
                for name, value in zip(ROW, (messages, images, origin, place == 0, 0, False), strict=True):
                    made[name].append(value)
        return made

    options = {"batched": True, "batch_size": 100, "with_indices": True, "remove_columns": list(form), "features": ROW}
    if streaming:
        return dataset.map(rows, **options)
    # datasets knows when a data file changes, but not when an image does that a data file names.
    fingerprint = fingerprint_of(dataset._fingerprint, Hasher.hash(rows), _stamps(dataset, folder))
    return dataset.map(rows, **options, new_fingerprint=fingerprint, desc=f"read {source}")


def _open(source: str, streaming: bool, split: str) -> tuple[AnyDataset, list[str]]:
    """A source with its images still encoded, and the names of its columns."""
    path = Path(source)
    if path.is_file() and path.suffix not in _BUILDERS:
        raise DatasetError(f"{source} ends in {path.suffix!r}; expected {', '.join(_BUILDERS)}, a folder, or a Hub id.")
    builder = {"path": _BUILDERS[path.suffix], "data_files": source} if path.is_file() else {"path": source}
    try:
        dataset = _undecoded(load_dataset(**builder, split=split, streaming=streaming))
        columns = list(next(iter(dataset)))
    except StopIteration:  # of an empty dataset; load_dataset itself raises it for an empty file
        raise DatasetError(f"{source} has no rows; expected at least one in its split {split!r}.") from None
    except (DatasetsError, OSError, ValueError) as error:
        why = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        raise DatasetError(
            f"{source} cannot be loaded as a dataset; expected a file, a folder or a Hub id, with a split {split!r}: {why}"
        ) from error
    return dataset, columns


def _undecoded(dataset: AnyDataset) -> AnyDataset:
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, ImageFeature):
            dataset = dataset.cast_column(name, ImageFeature(decode=False))
        elif isinstance(getattr(feature, "feature", None), ImageFeature):
            dataset = dataset.cast_column(name, List(ImageFeature(decode=False)))
    return dataset


def _images(row: dict) -> list:
    images = row["image"] if "image" in row else row.get("images") or []
    return images if isinstance(images, list) else [images]


def _encoded(image: Any, folder: Path) -> dict[str, Any] | None:
    """A path, bytes or both as one of them; None where there is neither."""
    if isinstance(image, str):
        return {"path": str(folder / image), "bytes": None}
    if isinstance(image, bytes):
        return {"path": None, "bytes": image}
    if not isinstance(image, dict) or (image.get("path") is None and image.get("bytes") is None):
        return None
    # Bytes keep no path: datasets would read a file of that name in the working directory instead.
    return {"path": None if image.get("bytes") is not None else image["path"], "bytes": image.get("bytes")}


def _file_name(image: Any) -> str | None:
    path = image.get("path") if isinstance(image, dict) else image
    return Path(path).name if isinstance(path, str) else None


def _stamps(dataset: Dataset, folder: Path) -> list[tuple[int, int] | None]:
    """Size and time of each image that a row names by its path; None where the file is missing."""
    column = next((name for name in ("image", "images") if name in dataset.column_names), None)
    if column is None:
        return []
    feature = getattr(dataset.features[column], "feature", dataset.features[column])
    stamps = []
    if isinstance(feature, (ImageFeature, dict)) or feature == Value("binary"):  # no paths written in words
        return stamps
    for value in dataset[column]:
        for image in _images({column: value}):
            encoded = _encoded(image, folder)
            try:
                stat = os.stat(encoded["path"]) if encoded and encoded["path"] else None
            except (OSError, ValueError):  # no file, or no name of one
                stat = None
            stamps.append(stat and (stat.st_size, stat.st_mtime_ns))
    return stamps


def _told(row: dict) -> list[list[dict]]:
    turns = [message if isinstance(message, dict) else {} for message in _list(row["messages"])]
    parts = [part for turn in turns for part in _list(turn.get("content")) if isinstance(part, dict)]
    unplaced = len(_images(row)) - sum(part.get("type") == "image" for part in parts)
    messages = []
    for turn in turns:
        role, content = turn.get("role"), turn.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
            if role == "user":  # TRL's: the first user turn that is a plain string holds the images that have no place
                content, unplaced = [{"type": "image"}] * unplaced + content, 0
        messages.append({"role": role, "content": [_part(part) for part in _list(content)]})
    return [messages]


def _list(value: Any) -> list:
    return value if isinstance(value, list) else []


def _part(part: Any) -> dict:
    if not isinstance(part, dict):
        return {"type": None, "text": None}
    return {"type": part.get("type"), "text": _words(part.get("text"))}


def _words(text: Any) -> str | None:
    """A text; None for what is none. Whole numbers are words: where all answers are digits, datasets takes them for numbers."""
    number = isinstance(text, int) and not isinstance(text, bool)
    return str(text) if number else text if isinstance(text, str) else None


def _asked(row: dict) -> list[list[dict]]:
    question = [{"type": "image"}, {"type": "text", "text": _words(row["question"])}]
    return [_exchange(question, [{"type": "text", "text": _words(row["answer"])}])]


def _referenced(row: dict) -> list[list[dict]]:
    """Each answer, as words or as VQA's {"answer": words}, is a turn of its own behind the question."""
    answers = _list(row["answers"]) or [None]  # which is refused where it is read: a row without an answer is a bad one
    told = [_words(answer.get("answer") if isinstance(answer, dict) else answer) for answer in answers]
    return [[*_to_answer(row)[0], *({"role": "assistant", "content": [{"type": "text", "text": text}]} for text in told)]]


def _to_answer(row: dict) -> list[list[dict]]:
    return [_asked(row | {"answer": None})[0][:1]]


def _to_draw(row: dict) -> list[list[dict]]:
    return _drawn_and_described(row)[:1]


def _drawn_and_described(row: dict) -> list[list[dict]]:
    image, caption = {"type": "image"}, {"type": "text", "text": _words(row["text"])}
    return [_exchange([caption], [image]), _exchange([image, {"type": "text", "text": CAPTION_REQUEST}], [caption])]


def _exchange(question: list[dict], answer: list[dict]) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


Forms = dict[tuple[str, ...], tuple[str, Callable[[dict], list[list[dict]]]]]
FORMS: Forms = {
    ("messages", "images"): ("TRL's: images of user turns are read, those of assistant turns drawn", _told),
    ("image", "question", "answer"): ("the image is read", _asked),
    ("image", "text"): ("each image is drawn from its text, and described by it", _drawn_and_described),
}
REFERENCED_FORMS: Forms = {  # to score, not to train on
    ("image", "question", "answers"): ("the image is read, and scored by several reference answers", _referenced),
}
UNFINISHED_FORMS: Forms = {  # rows that lack an answer, or the image to draw
    ("image", "question"): ("a teacher answers", _to_answer),
    ("text",): ("a teacher draws the text", _to_draw),
}


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
