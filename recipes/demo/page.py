"""What the buttons of the demo page do: load an adapter, draw, ask, take an upload."""

from __future__ import annotations

import html
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache

import gradio as gr
from demo.race import Drawing, race, warm_up
from PIL import Image
from rows.unknown_words import unknown_words
from scoring.contenders import Contender, answer, contenders, drawn_steps, read_tokens, why_no_drawing, with_adapter

from uc_adapters.errors import InputError, UnsupportedError
from uc_adapters.pictures import open_picture

LONGEST_TEXT = 500  # tokens of a prompt or a question
ADAPTERS = 4  # that stay loaded


@contextmanager
def explained() -> Iterator[None]:
    """Shows the visitor in one sentence what went wrong."""
    try:
        yield
    except (ValueError, OSError, SystemExit) as error:  # the last is how the recipes tell what cannot be loaded
        sentence = str(error).strip().partition("\n")[0]
        raise gr.Error(html.escape(sentence or type(error).__name__), print_exception=False) from None


def check_text(what: str, text: str, contender: Contender) -> str:
    """The text without blanks around it. A warning names the words in it that the model does not know.

    Raises:
        InputError: The text is empty or too long.
    """
    text = text.strip()
    tokenizer = contender.processor.tokenizer
    count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    if count == 0:
        raise InputError(f"The {what} is empty; expected at least one word. Write a {what}, or take an example below.")
    if count > LONGEST_TEXT:
        raise InputError(f"The {what} has {count} tokens; expected at most {LONGEST_TEXT}. Shorten it.")
    if unknown := unknown_words(tokenizer, [text]):
        words = html.escape(", ".join(unknown))
        gr.Warning(f"The model does not know {words}. It reads each as the same unknown word.")
    return text


def progress(drawing: Drawing) -> str:
    """The line below a drawing, as HTML."""
    if drawing.image is not None:
        return f"<b>{drawing.steps} steps, {drawing.seconds:.2f} s</b>"
    bar = f'<progress max="{drawing.total}" value="{drawing.steps}"></progress>'
    return f"{bar} step {drawing.steps} of {drawing.total}, {drawing.seconds:.2f} s"


def ratio(label: str, ratios: tuple[int, ...], default: int) -> gr.Dropdown:
    """The choice among the ratios that an adapter is trained for. It is hidden if there is none to make."""
    several = len(ratios) > 1
    return gr.Dropdown(list(ratios), value=default if several else None, label=label, visible=several)


class Page:
    """A base, the adapters that visitors chose, and what both do for a visitor.

    Args:
        base: The base, as a folder or a Hub id.
        device: The torch device.
        **sampling: How to draw; passed to `generate`.
    """

    def __init__(self, base: str, device: str, **sampling):
        (self.base,) = contenders(base, None, device)
        self.sampling = sampling
        self.adapter = lru_cache(maxsize=ADAPTERS)(self._load)
        if self.draws:
            warm_up(self.base)

    @property
    def draws(self) -> bool:
        return why_no_drawing(self.base) is None

    def _load(self, adapter: str) -> Contender:
        if not adapter:
            raise InputError("The adapter is empty; expected a Hub id such as org/name, or a folder.")
        loaded = with_adapter(self.base, adapter, "adapter")
        loaded.model.merge_if_room()
        if self.draws:
            warm_up(loaded)
        return loaded

    def ratios(self, adapter: str) -> list[gr.Dropdown]:
        """The choices of an adapter: codes in a step, and stride."""
        config = self.adapter(adapter.strip()).model.active_peft_config
        return [
            ratio("Codes in a step", config.strip_lengths if self.draws else (), config.strip_length()),
            ratio("Stride", config.strides, config.read_stride()),
        ]

    def describe(self, adapter: str) -> list:
        """Loads an adapter; what it saves, as Markdown, and its choices."""
        with explained():
            loaded = self.adapter(adapter.strip())
            told = [f"reads a picture in **{read_tokens(loaded.processor)}** tokens (base: {read_tokens(self.base.processor)})"]
            if self.draws:
                told.append(f"draws one in **{drawn_steps(loaded)}** steps (base: {drawn_steps(self.base)})")
            return [f"This adapter {' and '.join(told)}.", *self.ratios(adapter)]

    def draw(self, prompt: str, seed: int | None, adapter: str, codes_per_step: int | None = None) -> Iterator[list]:
        """Yields the picture and the progress of the base, and those of the adapter."""
        with explained():
            if not self.draws:
                raise UnsupportedError(f"This base cannot draw: {why_no_drawing(self.base)}. Ask it about a picture instead.")
            prompt = check_text("prompt", prompt, self.base)
            loaded = self.adapter(adapter.strip())
            loaded.model.active_peft_config.strip_length(codes_per_step)  # the base would draw first
            pair = [self.base, replace(loaded, codes_per_step=codes_per_step)]
            for drawings in race(pair, prompt, seed or 0, **self.sampling):
                yield [part for drawing in drawings for part in (drawing.image, progress(drawing))]

    def ask(self, picture: str | None, question: str, adapter: str, stride: int | None = None) -> Iterator[list[str]]:
        """Yields the answer of the base, then the adapter's as well."""
        with explained():
            if picture is None:
                raise InputError("There is no picture; expected one. Upload a picture, or take an example below.")
            question = check_text("question", question, self.base)
            image, answers, loaded = open_picture(picture), ["", ""], self.adapter(adapter.strip())
            at_stride = replace(loaded, processor=loaded.model.compact_processor(loaded.processor, stride))
            for index, contender in enumerate([self.base, at_stride]):
                start = time.perf_counter()
                (told,) = answer(contender, [image], [question], max_new_tokens=64)
                answers[index] = f"{told}\n({time.perf_counter() - start:.2f} s)"
                yield answers

    def upload(self, path: str) -> Image.Image:
        """The picture in a file that was uploaded."""
        with explained():
            return open_picture(path)
