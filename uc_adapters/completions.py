"""Splits a conversation into prompts, as inference shows them to the model, and completions, which the model learns."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import ProcessorMixin

from .errors import InputError


@dataclass(frozen=True)
class Completion:
    """An answer or a drawing to learn, with its prompt.

    Attributes:
        prompt: The text that the chat template writes before it. Each image is one image token of the processor.
        images: The number of images in the prompt. They are the first ones of the conversation, and the model reads them.
        words: The text that the chat template writes for an answer. None if the next image of the conversation is drawn.
    """

    prompt: str
    images: int
    words: str | None


def completions(processor: ProcessorMixin, messages: list[dict], given: int = 0) -> list[Completion]:
    """Returns every answer and every drawing of the assistant turns, in order.

    Each text and each image of a turn is a completion of its own, since one call of inference either answers or draws. Later
    prompts read the drawn image, as they do when a conversation goes on.

    Args:
        processor: The processor whose chat template writes the prompts.
        messages: Turns, as `uc_adapters.messages.normalised` returns them.
        given: The number of leading turns that are context only. Default 0.

    Raises:
        InputError: There is no chat template, it fails, it does not write each image once, or a turn that it writes does not
            begin with its own generation prompt.
    """
    made = []
    for index, turn in enumerate(messages):
        if turn["role"] != "assistant" or index < given:
            continue
        prompt = _render(processor, messages[:index], add_generation_prompt=True)
        whole = _render(processor, messages[: index + 1])
        if not whole.startswith(prompt):
            raise InputError(
                f"The chat template writes turn {index + 1} as {_end(whole)!r}, which does not continue its own generation "
                f"prompt, {_end(prompt)!r}; expected a template that only appends. Use the base's own template, or correct it."
            )
        images, answers = prompt.count(processor.image_token), _answers(turn["content"])
        written = whole[len(prompt) :].split(processor.image_token)
        for place, (words, answer) in enumerate(zip(written, answers, strict=True)):
            if place:
                made.append(Completion(prompt, images, None))
                prompt, images = prompt + processor.image_token, images + 1
            if answer:
                made.append(Completion(prompt, images, words))
            if answer or place:  # an image that comes first is drawn right after the generation prompt
                prompt += words
    return made


def _render(processor: ProcessorMixin, messages: list[dict], **kwargs) -> str:
    """Returns the text that the chat template writes for the messages, after checking its images."""
    try:
        text = processor.apply_chat_template(messages, tokenize=False, **kwargs)
    except Exception as error:  # a jinja error, or any error that the template raises
        roles = ", ".join(turn["role"] for turn in messages)
        raise InputError(
            f"The chat template fails on turns with the roles {roles}: {error} Expected a template that accepts these turns. "
            "Use the base's own template, or change the conversation."
        ) from error
    if "{'type': " in text:
        raise InputError(
            "The chat template prints a turn's content as a Python list, {'type': ...}; expected a template that handles "
            "content given as a list of parts. Use the base's own template, or correct it."
        )
    expected = sum(part["type"] == "image" for turn in messages for part in turn["content"])
    if text.count(processor.image_token) != expected:
        raise InputError(
            f"The chat template writes {text.count(processor.image_token)} image token(s) for {expected} image(s); expected "
            f"{processor.image_token} once for each. Use the base's own template, or correct it."
        )
    return text


def _answers(content: list[dict]) -> list[bool]:
    """Returns, for each image of a turn, whether text comes before it, and last, whether text comes after the last image."""
    answers = [False]
    for part in content:
        if part["type"] == "image":
            answers.append(False)
        else:
            answers[-1] = True
    return answers


def _end(text: str, shown: int = 60) -> str:
    """Returns the end of a text, for messages."""
    return text if len(text) <= shown else f"...{text[-shown:]}"
