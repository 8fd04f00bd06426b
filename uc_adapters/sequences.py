"""Token sequences of one row: prompts as inference writes them, and completions with their labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from transformers import ProcessorMixin

from .caption_dropout import CaptionDropout
from .completions import Completion
from .families import family_of_processor


@dataclass
class Sequence:
    """Token ids of one prompt and its completion, or of several prompts that continue one another; unpadded.

    Attributes:
        ids: L of them.
        labels: L of them, -100 where nothing is to learn.
        drawn: L of them, True at the places of the image to draw.
        read: How many images of the row it reads: its first ones.
        draws: Whether it ends in an image to draw.
        end: The token that ends its last answer, while it is not written yet.
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    drawn: list[bool] = field(default_factory=list)
    read: int = 0
    draws: bool = False
    end: int | None = None

    def continues_in(self, prompt: list[int]) -> bool:
        """Whether a later prompt begins with all of this sequence. An image that is drawn here is read there."""
        return not self.draws and len(prompt) > len(self.ids) and prompt[: len(self.ids)] == self.ids

    def prompt(self, ids: list[int]) -> None:
        """Appends what is not learned. The answer before it is learned to end there, whatever the template writes behind it."""
        self._append(ids, [-100] * len(ids), [False] * len(ids))
        if self.end is not None:
            self.labels[-len(ids)], self.end = self.end, None

    def answer(self, ids: list[int], end: int) -> None:
        """Appends words to learn."""
        self._append(ids, ids, [False] * len(ids))
        self.end = end

    def draw(self, ids: list[int], places: list[bool], separator: int, end: int) -> None:
        """Appends an image to draw, the separator at the place of that number: it is never predicted."""
        labels = [token if place else -100 for token, place in zip(ids, places, strict=True)]
        labels[[index for index, place in enumerate(places) if place][separator]] = -100
        self._append(ids, labels, places)
        self.draws, self.end = True, end

    def finish(self) -> None:
        """Appends the end of the last answer, where no prompt follows."""
        if self.end is not None:
            self._append([self.end], [self.end], [False])
            self.end = None

    def _append(self, ids: list[int], labels: list[int], drawn: list[bool]) -> None:
        self.ids += ids
        self.labels += labels
        self.drawn += drawn


@dataclass(frozen=True)
class DrawnImage:
    """What a prompt to draw ends in, the rest of the image's text, and bytes that tell the image from others."""

    begin: str
    rest: str
    content: bytes


class SequenceWriter:
    """Writes the sequences of a row.

    Args:
        processor: The adapter's.
        ends: Tokens that end generation.
        end: The one of them that is written where the chat template writes none.
        separator: The place of the separator among those of an image to draw.
    """

    def __init__(self, processor: ProcessorMixin, ends: list[int], end: int, separator: int):
        self.processor, self.tokenizer, self.family = processor, processor.tokenizer, family_of_processor(processor)
        self.ends, self.end, self.separator = ends, end, separator
        self.image_id = self.tokenizer.convert_tokens_to_ids(processor.image_token)

    def write(
        self, learned: list[Completion], read: list[str], drawn: Iterator[DrawnImage], dropout: CaptionDropout
    ) -> list[Sequence]:
        """The sequences of one row.

        Args:
            learned: What it has to say.
            read: The texts of the images in its prompts.
            drawn: Its images to draw, in order.
            dropout: Chooses the drawings whose prompts lose their words.
        """
        made: list[Sequence] = []
        for one in learned:
            to_draw = one.words is None
            text = self.family.prompt_text(self.processor, self._with_images(one.prompt, read), to_draw)
            image = next(drawn) if to_draw else None
            text += image.begin if to_draw else ""
            prompt = self._tokens(text)
            if to_draw and dropout.drops(one.prompt.encode() + image.content):
                made.append(Sequence())
                made[-1].prompt(self._unconditional(prompt))
            else:
                if not made or not made[-1].continues_in(prompt):
                    made.append(Sequence())
                made[-1].prompt(prompt[len(made[-1].ids) :])
                made[-1].read = one.images
            if to_draw:
                ids = self._behind(text, prompt, image.rest)
                made[-1].draw(ids, [token == self.image_id for token in ids], self.separator, self.end)
            else:
                made[-1].answer(*self._answer(text, prompt, one.words))
        for sequence in made:
            sequence.finish()
        return made

    def _with_images(self, prompt: str, read: list[str]) -> str:
        """A prompt with the texts of its images."""
        first, *others = prompt.split(self.processor.image_token)
        return first + "".join(image + words for image, words in zip(read[: len(others)], others, strict=True))

    def _answer(self, text: str, prompt: list[int], words: str) -> tuple[list[int], int]:
        """The tokens of an answer, and the one that ends it: the template's, or else the base's."""
        ids = self._behind(text, prompt, words)
        place = next((place for place, token in enumerate(ids) if token in self.ends), None)
        if place is not None:
            return ids[:place], ids[place]
        return self._behind(text, prompt, words.rstrip()), self.end

    def _unconditional(self, prompt: list[int]) -> list[int]:
        """A drawing prompt without its words: what `Family.unconditional` makes of it for guidance."""
        start = self.tokenizer.convert_tokens_to_ids(self.processor.image_start_token)
        last = len(prompt) - 1 - prompt[::-1].index(start)
        kept = (self.tokenizer.bos_token_id, start)
        return [token if token in kept or place > last else self.tokenizer.pad_token_id for place, token in enumerate(prompt)]

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def _behind(self, text: str, ids: list[int], words: str) -> list[int]:
        """The tokens of words behind a text of tokens `ids`. Where the two would merge at the seam, the words' own."""
        whole = self._tokens(text + words)
        if whole[: len(ids)] == ids:
            return whole[len(ids) :]
        return self.tokenizer(words, add_special_tokens=False)["input_ids"]
