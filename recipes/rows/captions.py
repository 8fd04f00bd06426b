"""Rows that are a caption and the image to generate from it, and the checks of rows that are scored."""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset, concatenate_datasets
from rows.conversations import DatasetError, conversations, decoded
from tqdm.auto import tqdm


def caption_of(row: dict) -> str:
    """The text of a row's first turn."""
    return " ".join(part["text"] for part in row["messages"][0]["content"] if part["type"] == "text")


def is_drawn(row: dict) -> bool:
    """Whether a row is a caption and the image to draw for it."""
    parts = [[part["type"] for part in turn["content"]] for turn in row["messages"]]
    return len(parts) == 2 and "image" not in parts[0] and parts[1] == ["image"]


def drawn_rows(rows: Dataset) -> Dataset:
    """Those of the rows that are a caption and the image to draw for it."""
    return rows.select([index for index, row in enumerate(rows) if is_drawn(row)])


def labelled_pictures(source: str, splits: Sequence[str], labels: Sequence[str], columns: dict[str, str]) -> Dataset:
    """The captions with their images in several splits of a source, one split behind the other, with a column for each label.

    Raises:
        DatasetError: A split has none, an image is damaged, or a label is missing or empty.
    """
    rows = []
    for split in splits:
        rows.append(drawn_rows(conversations(source, split=split, columns=columns, labels=labels)))
        if not rows[-1]:
            raise DatasetError(f"{source} has no captions with an image in its split {split!r}; expected some to judge by.")
    pictures = concatenate_datasets(rows)
    for label in labels:
        for origin, value in zip(pictures["origin"], pictures[label], strict=True):
            if not (value or "").strip():
                raise DatasetError(f"{origin}: its {label} is empty; expected a text, because --labels judges by it.")
    check_rows(pictures)
    return pictures


def check_rows(rows: Dataset) -> None:
    """Raises a DatasetError if a row cannot be scored."""
    for row in tqdm(rows, desc="check rows", leave=False):
        try:
            row = decoded(row)
        except Exception as error:  # a damaged file can raise anything, from PIL or from datasets
            raise DatasetError(f"{row['origin']}: {type(error).__name__}: {error}") from error
        parts = sum(part["type"] == "image" for turn in row["messages"] for part in turn["content"])
        if parts != len(row["images"]):
            raise DatasetError(
                f"{row['origin']}: {len(row['images'])} image(s) for {parts} image part(s) in the messages; expected as many."
            )
        if is_drawn(row) and not all(part.get("text", "").strip() for part in row["messages"][0]["content"]):
            raise DatasetError(f"{row['origin']}: a caption without words; expected a text to draw the image from.")
