"""Rows that are a caption and the image to generate from it."""

from __future__ import annotations


def caption_of(row: dict) -> str:
    """The text of a row's first turn."""
    return " ".join(part["text"] for part in row["messages"][0]["content"] if part["type"] == "text")


def is_drawn(row: dict) -> bool:
    """Whether a row is a caption and the image to draw for it."""
    parts = [[part["type"] for part in turn["content"]] for turn in row["messages"]]
    return len(parts) == 2 and "image" not in parts[0] and parts[1] == ["image"]
