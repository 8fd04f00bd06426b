"""Makes the turns of a conversation from common columns: messages, ShareGPT's, prompts, questions, captions."""

from __future__ import annotations

from typing import Any

from uc_adapters.messages import normalised

CAPTION_REQUEST = "Describe the image."
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "function": "tool"}  # ShareGPT's
_IMAGE = {"type": "image"}


def images_of(row: dict) -> list:
    """The images of a row, with None in place of one that must be there and is missing."""
    if "images" in row:
        return _as_list(row["images"])
    if "image" not in row:
        return []
    if row["image"] is None:  # a conversation needs no image; a question about one, or a caption, does
        return [] if {"messages", "conversations", "prompt"} & set(row) else [None]
    return _as_list(row["image"])


def told(row: dict) -> list[list[dict]]:
    """The turns that a row already has: {"role", "content"}, or ShareGPT's {"from", "value"}."""
    return [_turns(row["messages"] if "messages" in row else row["conversations"], row)]


def continued(row: dict) -> list[list[dict]]:
    """The turns of TRL's prompt and completion, each of which is a text or a list of turns."""
    return [_turns([*_said(row["prompt"], "user"), *_said(row["completion"], "assistant")], row)]


def given(row: dict) -> int:
    """How many turns at the start are not learned: those of TRL's prompt."""
    return len(_said(row["prompt"], "user")) if "prompt" in row else 0


def asked(row: dict) -> list[list[dict]]:
    """A question about an image, and its answer."""
    return [_turns([_question(row), *_said(_words(row["answer"]), "assistant")], row)]


def referenced(row: dict) -> list[list[dict]]:
    """A question about an image, and a turn for each of its answers: texts, or VQA's {"answer": text}."""
    answers = row["answers"] if isinstance(row["answers"], list) and row["answers"] else [None]  # None makes it a bad row
    texts = [_words(answer.get("answer") if isinstance(answer, dict) else answer) for answer in answers]
    return [_turns([_question(row), *(turn for text in texts for turn in _said(text, "assistant"))], row)]


def to_answer(row: dict) -> list[list[dict]]:
    """A question about an image, for a teacher to answer."""
    return [_turns([_question(row)], row)]


def to_draw(row: dict) -> list[list[dict]]:
    """A caption, for a teacher to draw."""
    return drawn_and_described(row)[:1]


def drawn_and_described(row: dict) -> list[list[dict]]:
    """Two conversations: the image is drawn from its text, then described by it."""
    caption, request = _text(_words(row["text"])), _text(CAPTION_REQUEST)
    return [
        [{"role": "user", "content": [caption]}, {"role": "assistant", "content": [_part(_IMAGE)]}],
        [{"role": "user", "content": [_part(_IMAGE), request]}, {"role": "assistant", "content": [caption]}],
    ]


def _turns(turns: Any, row: dict) -> list[dict]:
    """Turns in the form of `uc_adapters.messages`, where every part has all the fields of ROW."""
    turns = [_turn(turn) for turn in turns] if isinstance(turns, list) else []
    messages = normalised(turns, len(images_of(row)))
    return [{"role": turn["role"], "content": [_part(part) for part in turn["content"]]} for turn in messages]


def _turn(turn: Any) -> dict:
    """A turn with TRL's names, and with its texts as strings."""
    if not isinstance(turn, dict):
        return {"role": None, "content": None}
    speaker, content = turn.get("from"), turn.get("value")
    if speaker is None:
        speaker, content = turn.get("role"), turn.get("content")
    role = SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else None
    return {"role": role, "content": [_part(part) for part in content] if isinstance(content, list) else _words(content)}


def _said(content: Any, role: str) -> list:
    """A list of turns unchanged, or a text as one turn of `role`."""
    if isinstance(content, list):
        return content
    return [{"role": role, "content": [_text(None)] if content is None else content}]


def _question(row: dict) -> dict:
    """The turn of a question. The image is first, or where a marker is. A missing text stays a part that a check can name."""
    question = _words(row["question"])
    return {"role": "user", "content": [_IMAGE, _text(None)] if question is None else question}


def _part(part: Any) -> dict:
    if not isinstance(part, dict):
        return {"type": None, "text": None}
    kind = part.get("type")
    return {"type": kind if isinstance(kind, str) else None, "text": _words(part.get("text"))}


def _text(text: str | None) -> dict:
    return {"type": "text", "text": text}


def _words(text: Any) -> str | None:
    """A text, or a whole number as one; else None. If all answers are digits, datasets reads them as numbers."""
    number = isinstance(text, int) and not isinstance(text, bool)
    return str(text) if number else text if isinstance(text, str) else None


def _as_list(value: Any) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]
