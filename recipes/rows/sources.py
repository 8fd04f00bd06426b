"""Opens a dataset by its name: a Hub id, a file, a folder of data files, or a folder of images with texts."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from glob import escape
from pathlib import Path
from typing import NamedTuple

import yaml
from datasets import Dataset, Features, IterableDataset, List, NamedSplit, Value, get_dataset_split_names, load_dataset
from datasets import Image as ImageFeature
from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub import metadata_load
from tqdm.auto import tqdm

AnyDataset = Dataset | IterableDataset
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
IMAGE_SUFFIXES = {*ImageFolder.EXTENSIONS, ".avif", ".heic", ".heif"}  # PIL may lack the last two; such a row is bad
METADATA = set(ImageFolder.METADATA_FILENAMES)
_TABLES = {*BUILDERS, ".csv", ".tsv", ".arrow", ".tar", ".zip"}
_SPLIT_NAMES = {  # the names by which datasets recognises a split
    str(split): re.compile(rf"(^|[{NON_WORDS_CHARS}])({'|'.join(words)})([{NON_WORDS_CHARS}]|$)", re.IGNORECASE)
    for split, words in SPLIT_KEYWORDS.items()
}


class DatasetError(ValueError):
    """A dataset that cannot be used. The message says what was found, what was expected, and what to do."""


class Source(NamedTuple):
    """An open dataset.

    Attributes:
        rows: The rows, with images still encoded.
        first: Its first row.
        folder: The folder that paths of images are relative to.
        files: Image files whose change datasets' cache would not notice.
    """

    rows: AnyDataset
    first: dict
    folder: Path
    files: list[Path]


def open_source(source: str, split: str, streaming: bool) -> Source:
    """Opens a split of a Hub id, a folder or a file.

    Raises:
        DatasetError: There is nothing to load, no such split, or no row.
    """
    path = Path(source)
    if path.is_file() and path.suffix not in BUILDERS:
        raise DatasetError(f"{source} ends in {path.suffix!r}; expected {', '.join(BUILDERS)}, a folder, or a Hub id.")
    options = {"path": BUILDERS[path.suffix], "data_files": escape(source)} if path.is_file() else {"path": source}
    pictures, files = _image_folder(path) if path.is_dir() else None, []
    try:
        if pictures:
            rows, files = _open_image_folder(path, pictures, split, streaming)
        else:
            rows = _undecoded(load_dataset(**options, split=split, streaming=streaming))
        first = next(iter(rows))
    except (StopIteration, IndexError):  # no rows; load_dataset itself raises these for an empty file or metadata
        raise _no_rows(source, split) from None
    except DatasetError:
        raise
    except (DatasetsError, OSError, ValueError) as error:
        if "corresponds to no data" in str(error):  # datasets has no error class for this
            raise _no_rows(source, split) from None
        found = [] if pictures else _splits(options)
        if found and split not in found:
            raise _no_split(source, split, found) from error
        why = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        raise DatasetError(
            f"{source} cannot be loaded as a dataset; expected a file, a folder or a Hub id, with a split {split!r}: {why}"
        ) from error
    return Source(rows, first, path if path.is_dir() else path.parent, files)


def _no_rows(source: str, split: str) -> DatasetError:
    return DatasetError(f"{source} has no rows; expected at least one in its split {split!r}.")


def _splits(options: dict) -> list[str]:
    """The splits of a source that could not be loaded; empty if the split is not the reason."""
    try:
        return get_dataset_split_names(**options)
    except (DatasetsError, OSError, ValueError):
        return []


def _no_split(source: str, split: str, found: list[str]) -> DatasetError:
    return DatasetError(f"{source} has no split {split!r}; it has {', '.join(found)}. Choose one of them (--split).")


def _undecoded(rows: AnyDataset) -> AnyDataset:
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, ImageFeature):
            rows = rows.cast_column(name, ImageFeature(decode=False))
        elif isinstance(getattr(feature, "feature", None), ImageFeature):
            rows = rows.cast_column(name, List(ImageFeature(decode=False)))
    return rows


class _Files(NamedTuple):
    """The files of a folder of images, or of a split of it."""

    images: list[Path]
    metadata: list[Path]
    captions: set[Path]  # cat.txt has the caption of cat.png
    tables: list[Path]  # other data files


def _image_folder(folder: Path) -> _Files | None:
    """The files of a folder of images; None for a folder of data files, or one whose card names its splits."""
    images, metadata, texts, tables = [], [], set(), []
    for file in _files(folder):
        suffix = file.suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            images.append(file)
        elif file.name in METADATA:
            metadata.append(file)
        elif file.suffix == ".txt":
            texts.add(file)
        elif suffix in _TABLES:
            tables.append(file)
    captions = texts & {image.with_suffix(".txt") for image in images}
    of_images = images and (metadata or captions or len(images) > len(tables))
    return _Files(images, metadata, captions, tables) if of_images and not _names_splits(folder) else None


def _files(folder: Path) -> Iterator[Path]:
    """All files of a folder, in order, except hidden ones, which datasets leaves out, too."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))


def _names_splits(folder: Path) -> bool:
    card = folder / "README.md"
    try:
        return card.is_file() and "configs" in (metadata_load(card) or {})
    except (ValueError, yaml.YAMLError):  # not the card of a dataset
        return False


def _open_image_folder(folder: Path, found: _Files, split: str, streaming: bool) -> tuple[AnyDataset, list[Path]]:
    """Opens a folder of images by its metadata files, or else by its captions.

    Returns:
        The rows, and those image files whose paths are not in the rows as text.
    """
    files = _files_of_split(folder, [*found.images, *found.metadata], split)
    images = [file for file in files if file.name not in METADATA]
    metadata = [file for file in files if file.name in METADATA]
    captions = [file for file in images if file.with_suffix(".txt") in found.captions]
    tables = ", ".join(str(table.relative_to(folder)) for table in found.tables[:3])
    if not metadata and not captions:
        raise DatasetError(
            f"{folder} has {len(images)} image(s) and no texts for them in its split {split!r}; expected a metadata.jsonl with "
            "file_name (it becomes the column image) or file_names (images), or the caption of cat.png in cat.txt."
            + (f" If the rows are in {tables}, pass that file." if tables else "")
        )
    if tables or (metadata and captions):
        texts = metadata[0].name if metadata else "captions in .txt files"
        unread = ", ".join(filter(None, [tables, ".txt files" if metadata and captions else None]))
        tqdm.write(f"{folder}: reads its images with {texts}; leaves out {unread}.")
    if not metadata:
        rows = [{"image": str(file.relative_to(folder)), "text": _caption(file, found.captions)} for file in images]
        make = IterableDataset if streaming else Dataset
        features = Features({"image": Value("string"), "text": Value("string")})
        # A tuple, because datasets would split a list into shards.
        return make.from_generator(_each, features, gen_kwargs={"rows": tuple(rows)}, split=NamedSplit(split)), []
    files = {split: [escape(str(file.absolute())) for file in metadata]}
    rows = _undecoded(load_dataset("imagefolder", data_files=files, split=split, streaming=streaming))
    if not streaming:
        _say_left_out(folder, images, rows)
    return rows, images


def _files_of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """The images and metadata files of a split.

    Only folders make splits: "test" in an image's own name may say what it shows.

    Raises:
        DatasetError: There is no such split, or only some of the files are in folders named like splits.
    """
    splits: dict[str | None, list[Path]] = defaultdict(list)
    for file in files:
        splits[_split_of(file.relative_to(folder))].append(file)
    if None in splits and len(splits) > 1:
        others, named = splits.pop(None), [file for of_split in splits.values() for file in of_split]
        raise DatasetError(
            f"{folder} has files in folders named like splits ({_places(named, folder)}) and elsewhere "
            f"({_places(others, folder)}), so that the splits are not clear. Expected all images and metadata files in "
            "such folders, or none. Rename those folders, or move everything into one folder named train."
        )
    if None in splits:
        splits["train"] = splits.pop(None)
    if split not in splits:
        raise _no_split(str(folder), split, list(splits))
    return splits[split]


def _split_of(file: Path) -> str | None:
    """The split named by the first of a file's folders that is named like a split; None if there is none."""
    for name in file.parent.parts:
        for split, pattern in _SPLIT_NAMES.items():
            if pattern.search(name):
                return split
    return None


def _places(files: list[Path], folder: Path) -> str:
    """Where files are, as text: at most three of their folders, or of their names if they are in no subfolder."""
    places = [file.relative_to(folder) for file in files]
    names = dict.fromkeys(f"{place.parent}/" if place.parent.parts else place.name for place in places)
    return ", ".join([*list(names)[:3], *(["..."] if len(names) > 3 else [])])


def _each(rows: tuple[dict, ...]) -> Iterator[dict]:
    yield from rows


def _caption(image: Path, captions: set[Path]) -> str | None:
    """The caption of an image; None, which makes the row bad, if there is none or it cannot be read."""
    file = image.with_suffix(".txt")
    try:
        return file.read_text(encoding="utf-8-sig").strip() if file in captions else None
    except (OSError, UnicodeDecodeError):
        return None


def _say_left_out(folder: Path, images: list[Path], rows: Dataset) -> None:
    """Prints the images that no metadata file names, since they make no row."""
    named = set()
    for name, feature in rows.features.items():
        if isinstance(feature, ImageFeature):
            named |= {_path(image) for image in rows[name]}
        elif isinstance(getattr(feature, "feature", None), ImageFeature):
            named |= {_path(image) for several in rows[name] for image in several or []}
    unnamed = [image for image in images if _path({"path": str(image.absolute())}) not in named]
    if unnamed:
        examples = ", ".join(str(image.relative_to(folder)) for image in unnamed[:3])
        tqdm.write(f"{folder}: {len(unnamed)} of {len(images)} images are in no metadata file: left out ({examples}).")


def _path(image: dict | None) -> str | None:
    return os.path.normpath(image["path"]) if image and image["path"] else None
