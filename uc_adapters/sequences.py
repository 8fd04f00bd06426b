"""Writes the token sequences of a row: prompts as inference writes them, and completions with their labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from transformers import ProcessorMixin

from .completions import Completion
from .families import family_of_processor


@dataclass
class Sequence:
    """The unpadded tokens of one prompt and its completion, or of several prompts that continue one another.

    Attributes:
        ids: L token ids.
        labels: L labels, -100 for tokens that are not learned.
        drawn: L flags, True for the placeholders of the image to draw.
        read: The number of images of the row that this sequence reads. They are the first ones.
        draws: Whether the sequence ends in an image to draw.
        end: The token that ends the last answer, if it is not written yet; otherwise None.
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    drawn: list[bool] = field(default_factory=list)
    read: int = 0
    draws: bool = False
    end: int | None = None

    def continues_in(self, prompt: list[int]) -> bool:
        """Returns whether a prompt begins with this whole sequence. Never true after a drawing: later prompts read it."""
        return not self.draws and len(prompt) > len(self.ids) and prompt[: len(self.ids)] == self.ids

    def prompt(self, ids: list[int]) -> None:
        """Appends tokens that are not learned.

        Only the first of them has a label, the end of the answer before it, whatever the template writes there.
        """
        self._append(ids, [-100] * len(ids), [False] * len(ids))
        if self.end is not None:
            self.labels[-len(ids)], self.end = self.end, None

    def answer(self, ids: list[int], end: int) -> None:
        """Appends the tokens of an answer to learn. `end` ends it, and is written later."""
        self._append(ids, ids, [False] * len(ids))
        self.end = end

    def draw(self, ids: list[int], places: list[bool], given: list[int], end: int) -> None:
        """Appends a drawing. The placeholders with the indices `given` are never predicted."""
        labels = [token if place else -100 for token, place in zip(ids, places, strict=True)]
        placeholders = [index for index, place in enumerate(places) if place]
        for place in given:
            labels[placeholders[place]] = -100
        self._append(ids, labels, places)
        self.draws, self.end = True, end

    def finish(self) -> None:
        """Appends the end token of the last answer, if no prompt has followed it."""
        if self.end is not None:
            self._append([self.end], [self.end], [False])
            self.end = None

    def _append(self, ids: list[int], labels: list[int], drawn: list[bool]) -> None:
        self.ids += ids
        self.labels += labels
        self.drawn += drawn


@dataclass(frozen=True)
class DrawnImage:
    """The text and content of an image to draw, with its preview if there is one.

    Attributes:
        begin: The wrapper text with which the prompt ends.
        rest: The rest of the image's text: its placeholders and closing wrapper text.
        given: The indices of learned global tokens and separators among its placeholders.
        content: Bytes that differ between images, and between occurrences of a row, for caption dropout.
    """

    begin: str
    rest: str
    given: list[int]
    content: bytes


class SequenceWriter:
    """Writes the sequences of rows.

    Args:
        processor: The adapter's processor.
        ends: The tokens that end generation.
        end: The one of `ends` to write if the chat template writes none.
    """

    def __init__(self, processor: ProcessorMixin, ends: list[int], end: int):
        self.processor, self.tokenizer, self.family = processor, processor.tokenizer, family_of_processor(processor)
        self.ends, self.end = ends, end
        self.image_id = self.tokenizer.convert_tokens_to_ids(processor.image_token)

    def write(
        self, learned: list[Completion], read: list[str], drawn: Iterator[DrawnImage], drops: Callable[[bytes], bool]
    ) -> list[Sequence]:
        """Returns the sequences of one row.

        Args:
            learned: The completions of the row.
            read: The texts of the images in its prompts.
            drawn: Its images to draw, in order.
            drops: Whether a drawing's prompt loses its text: called with the prompt, the image and the row's occurrence.
        """
        made: list[Sequence] = []
        for completion in learned:
            to_draw = completion.words is None
            text = self.family.prompt_text(self.processor, self._with_images(completion.prompt, read), to_draw)
            image = next(drawn) if to_draw else None
            text += image.begin if to_draw else ""
            prompt = self._tokens(text)
            may_drop = to_draw and (self.family.guides_edits or not completion.images)
            if may_drop and drops(completion.prompt.encode() + image.content):
                made.append(Sequence())
                made[-1].prompt(self._unconditional(prompt))
            else:
                if not made or not made[-1].continues_in(prompt):
                    made.append(Sequence())
                made[-1].prompt(prompt[len(made[-1].ids) :])
                made[-1].read = completion.images
            if to_draw:
                ids = self._behind(text, prompt, image.rest)
                made[-1].draw(ids, [token == self.image_id for token in ids], image.given, self.end)
            else:
                made[-1].answer(*self._answer(text, prompt, completion.words))
        for sequence in made:
            sequence.finish()
        return made

    def _with_images(self, prompt: str, read: list[str]) -> str:
        """Replaces the image tokens of a prompt with the texts of its images."""
        first, *others = prompt.split(self.processor.image_token)
        return first + "".join(image + words for image, words in zip(read[: len(others)], others, strict=True))

    def _answer(self, text: str, prompt: list[int], words: str) -> tuple[list[int], int]:
        """Returns the tokens of an answer, and the token that ends it: the one in the template, or else the default."""
        ids = self._behind(text, prompt, words)
        index = next((index for index, token in enumerate(ids) if token in self.ends), None)
        if index is not None:
            return ids[:index], ids[index]
        return self._behind(text, prompt, words.rstrip()), self.end

    def _unconditional(self, prompt: list[int]) -> list[int]:
        """Replaces the text tokens of a drawing prompt with padding, as `Family.unconditional` does for guidance."""
        places, pad = self.family.wrapper_places(self.processor, prompt), self.tokenizer.pad_token_id
        return [token if place else pad for token, place in zip(prompt, places, strict=True)]

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def _behind(self, text: str, ids: list[int], words: str) -> list[int]:
        """Returns the tokens of `words` after `text` (with tokens `ids`). If a token spans both, tokenises `words` alone."""
        whole = self._tokens(text + words)
        if whole[: len(ids)] == ids:
            return whole[len(ids) :]
        return self.tokenizer(words, add_special_tokens=False)["input_ids"]
