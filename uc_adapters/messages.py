"""Conversations as people have them, in one form: turns whose content is a list of parts."""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin

IMAGE_MARKER = "<image>"  # the place of an image in a text: LLaVA's convention, and the field's
ROLES = ("system", "user", "assistant", "tool")


def normalised(messages: Any, images: int) -> list[dict]:
    """Turns of `{"role": ..., "content": [{"type": "image"}, {"type": "text", "text": ...}]}`, whatever form they came in.

    A content may be a plain string. In a row with images, `<image>` in a text is the place of one. Images without a place go
    in front of the first user turn that is a plain string, as TRL puts them.

    Nothing is refused: what a turn lacks is None, and `malformed` names it.

    Args:
        messages: Turns in TRL's form.
        images: How many images the row has.
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
    """What is wrong with turns of `normalised`, in words; None where nothing is.

    Args:
        messages: Turns of `normalised`.
        processor: The base's or the adapter's. The tokens that it writes for an image are not to stand in a text.
    """
    image_tokens = (processor.image_token, processor.image_start_token, processor.image_end_token, IMAGE_MARKER)
    if not messages:
        return "no messages; expected turns of {'role': ..., 'content': ...}"
    for number, turn in enumerate(messages, 1):
        role, where = turn["role"], f"turn {number} ({turn['role']})"
        if role not in ROLES:
            return f"turn {number} has the role {role!r}; expected {', '.join(ROLES)}"
        if not turn["content"]:
            return f"{where} is empty; expected words or an image"
        for part in turn["content"]:
            if part["type"] == "image":
                if role not in ("user", "assistant"):
                    return f"{where} holds an image; expected images to read in user turns, to draw in assistant turns"
            elif part["type"] != "text":
                return f"{where} has a part of type {part['type']!r}; expected 'text' or 'image'"
            elif not isinstance(part.get("text"), str) or not part["text"].strip():
                return f"{where} has a text that is empty, missing or no string; expected words"
            elif written := next((token for token in image_tokens if token in part["text"]), None):
                return f"{where} has the image token {written} in its text; expected a part {{'type': 'image'}} and its image"
    return None


def _parts(content: Any, with_images: bool) -> list[dict]:
    """The parts of a turn's content, with an image part for each marker where the row has images."""
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
    """A text as parts: `What is <image> for?` is words, an image, words. Line breaks beside a marker belong to it."""
    if not isinstance(text, str) or not with_images or IMAGE_MARKER not in text:
        return [{"type": "text", "text": text}]
    parts = []
    for index, words in enumerate(text.split(IMAGE_MARKER)):
        parts += [{"type": "image"}] if index else []
        parts += [{"type": "text", "text": words.strip("\n")}] if words.strip() else []
    return parts


def _list(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else []
