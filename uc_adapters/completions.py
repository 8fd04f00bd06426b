"""A conversation as prompts and completions: what inference shows the model, and what it has to say there."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import ProcessorMixin

from .errors import InputError


@dataclass(frozen=True)
class Completion:
    """Something to learn.

    Attributes:
        prompt: What the chat template writes in front of it. An image is one token of the processor's.
        images: How many images of the conversation the prompt holds: its first ones, all of them read.
        words: What the chat template writes for an answer. None where the next image of the conversation is drawn.
    """

    prompt: str
    images: int
    words: str | None


def completions(processor: ProcessorMixin, messages: list[dict], given: int = 0) -> list[Completion]:
    """Every answer and every drawing of the assistant turns, in order.

    Words and images of one turn are completions of their own, since inference answers or draws in one call. A drawn image is
    read in the prompts behind it, as it is when a conversation goes on.

    Args:
        processor: Its chat template writes the prompts.
        messages: Turns of `uc_adapters.messages.normalised`.
        given: How many leading turns are context only. Default 0.

    Raises:
        InputError: There is no chat template, it fails, it does not write each image once, or it writes a turn otherwise than
            behind its own generation prompt.
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
            if answer or place:  # an image that comes first is drawn right behind the generation prompt
                prompt += words
    return made


def _render(processor: ProcessorMixin, messages: list[dict], **kwargs) -> str:
    """What the chat template writes."""
    try:
        text = processor.apply_chat_template(messages, tokenize=False, **kwargs)
    except Exception as error:  # jinja's own, or whatever a template raises
        roles = ", ".join(turn["role"] for turn in messages)
        raise InputError(
            f"The chat template fails on turns of {roles}: {error} Expected one that writes them. Use the base's own template, "
            "or change the conversation."
        ) from error
    if "{'type': " in text:
        raise InputError(
            "The chat template writes a content as Python prints it, {'type': ...}; expected a template for contents that are "
            "lists of parts. Use the base's own template, or correct it."
        )
    expected = sum(part["type"] == "image" for turn in messages for part in turn["content"])
    if text.count(processor.image_token) != expected:
        raise InputError(
            f"The chat template writes {text.count(processor.image_token)} image token(s) for {expected} image(s); expected "
            f"{processor.image_token} once for each. Use the base's own template, or correct it."
        )
    return text


def _answers(content: list[dict]) -> list[bool]:
    """Whether a turn has words before each of its images, and behind the last one."""
    answers = [False]
    for part in content:
        if part["type"] == "image":
            answers.append(False)
        else:
            answers[-1] = True
    return answers


def _end(text: str, shown: int = 60) -> str:
    return text if len(text) <= shown else f"...{text[-shown:]}"
