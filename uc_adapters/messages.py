"""Brings conversations of several forms into one: turns whose content is a list of parts."""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin

from .families import family_of_processor

IMAGE_MARKER = "<image>"  # marks the position of an image in a text, as LLaVA and most datasets do
ROLES = ("system", "user", "assistant", "tool")


def normalised(messages: Any, images: int) -> list[dict]:
    """Returns turns of the form `{"role": ..., "content": [{"type": "image"}, {"type": "text", "text": ...}]}`.

    The content of a given turn may also be a plain string. In a row with images, `<image>` in a text marks the position of one.
    Images without a mark go to the start of the first user turn that is a plain string, as in TRL.

    No turn is refused. A missing role or text becomes None, and `malformed` reports it.

    Args:
        messages: Turns in TRL's form.
        images: The number of images in the row.
    """
    turns = [message if isinstance(message, dict) else {} for message in _list(messages)]
    contents = [_parts(turn.get("content"), images > 0) for turn in turns]
    unplaced = images - sum(part["type"] == "image" for content in contents for part in content)
    made = []
    for turn, content in zip(turns, contents, strict=True):
        if unplaced > 0 and turn.get("role") == "user" and isinstance(turn.get("content"), str):
            content, unplaced = [{"type": "image"}] * unplaced + content, 0
        made.append({"role": turn.get("role"), "content": content})
    return made


def malformed(messages: list[dict], processor: ProcessorMixin) -> str | None:
    """Returns what is wrong with the turns, as a text for an error message, or None.

    Args:
        messages: Turns, as `normalised` returns them.
        processor: The processor of the base or the adapter. The tokens that it writes for images must not occur in a text.
    """
    image_tokens = (*family_of_processor(processor).image_tokens(processor), IMAGE_MARKER)
    if not messages:
        return "no messages; expected turns of {'role': ..., 'content': ...}"
    for number, turn in enumerate(messages, 1):
        role, where = turn["role"], f"turn {number} ({turn['role']})"
        if role not in ROLES:
            return f"turn {number} has the role {role!r}; expected {', '.join(ROLES)}"
        if not turn["content"]:
            return f"{where} is empty; expected a text or an image"
        for part in turn["content"]:
            if part["type"] == "image":
                if role not in ("user", "assistant"):
                    return f"{where} holds an image; expected images to read in user turns, images to draw in assistant ones"
            elif part["type"] != "text":
                return f"{where} has a part of type {part['type']!r}; expected 'text' or 'image'"
            elif not isinstance(part.get("text"), str) or not part["text"].strip():
                return f"{where} has a text that is empty, missing or no string; expected a string with text"
            elif written := next((token for token in image_tokens if token in part["text"]), None):
                return f"{where} has the image token {written} in its text; expected a part {{'type': 'image'}} and its image"
    return None


def _parts(content: Any, with_images: bool) -> list[dict]:
    """Returns the parts of a turn's content. If the row has images, each marker becomes an image part."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    parts = []
    for part in _list(content):
        if not isinstance(part, dict):
            parts.append({"type": None})
        elif part.get("type") == "text":
            parts += _split(part.get("text"), with_images)
        else:
            parts.append({"type": part.get("type")})
    return parts


def _split(text: Any, with_images: bool) -> list[dict]:
    """Splits a text at its markers: `What is <image> for?` gives text, image, text. Line breaks beside a marker are removed."""
    if not isinstance(text, str) or not with_images or IMAGE_MARKER not in text:
        return [{"type": "text", "text": text}]
    parts = []
    for index, piece in enumerate(text.split(IMAGE_MARKER)):
        parts += [{"type": "image"}] if index else []
        parts += [{"type": "text", "text": piece.strip("\n")}] if piece.strip() else []
    return parts


def _list(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else []
