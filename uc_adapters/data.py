"""The collator: an image in a user turn is read, an image in an assistant turn is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin

from .config import UniCompressConfig
from .errors import InputError
from .images import unpack_latents

Span = tuple[int, int]  # of characters: first, and last plus one


@dataclass
class _Turn:
    """What the chat template writes of a turn."""

    text: str
    assistant: bool


@dataclass
class _Row:
    """One row, unpadded."""

    input_ids: list[int]
    labels: list[int]
    drawn_mask: list[int]
    lost: int  # images to read that caption dropout took: its first ones


@dataclass
class UniCompressCollator:
    """Batches of TRL's conversational vision format, `{"messages": [...], "images": [...]}`, for `UniCompressModel`.

    Assistant turns are learned: their words, and the places of their images. What frames an image is not (its begin and end,
    its size, its row ends), nor is the separator, which is never predicted.

    A row may bring `latents`, one entry of `uc_adapters.images.pack_latents` an image: images to draw are then not encoded
    again. They are all left out, or none is.

    Args:
        processor: The adapter's processor: `AutoProcessor.from_pretrained(adapter)`, or `model.compact_processor(processor)`.
        config: The adapter's config.
        caption_dropout: Share of drawing rows whose prompt is replaced by padding, so that classifier-free guidance has
            its unconditional model. Default 0.1. Which rows these are follows from their content and from `epoch`: the same
            however rows are put into batches, shared out among processes, or resumed.
        epoch: To be counted up by who trains, so that other rows lose their captions in the next. Default 0.

    Raises:
        InputError: A share that is none; an empty batch, rows without messages, images that are not RGB, or more or fewer
            images than the messages mention.
    """

    processor: ProcessorMixin
    config: UniCompressConfig
    caption_dropout: float = 0.1
    epoch: int = 0

    def __post_init__(self):
        if not 0 <= self.caption_dropout <= 1:
            raise InputError(f"caption_dropout={self.caption_dropout}; expected a share from 0 to 1.")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Rows -> input_ids, attention_mask, labels, drawn_mask (B, L), pixel_values (N, 3, H, W), drawn_pixel_values (M, ...).

        With latents, drawn_latents (M, T, C) in place of the last. Where images have any size, also image_sizes (N, 2) and
        drawn_image_sizes (M, 2), in pixels.
        """
        if not rows:
            raise InputError("An empty batch; expected at least one row of {'messages': [...], 'images': [...]}.")
        for row in rows:
            if "messages" not in row:
                raise InputError(f"A row of {', '.join(row)}; expected {{'messages': [...], 'images': [...]}}.")
        turns = [self._render(row["messages"]) for row in rows]
        images = [self._images(row, row_turns) for row, row_turns in zip(rows, turns, strict=True)]
        read = self._pixels([image for to_read, _ in images for image in to_read])
        to_draw = [image for _, of_row in images for image in of_row]
        drawn = self._latents(to_draw) if to_draw and isinstance(to_draw[0], dict) else self._pixels(to_draw)
        encoded, kept, first_read, first_drawn = [], [], 0, 0
        for row_turns, (to_read, to_draw) in zip(turns, images, strict=True):
            blocks = self._blocks(read, first_read, len(to_read)), self._drawn_blocks(drawn, first_drawn, len(to_draw))
            lost = bool(to_draw) and self._coin(row_turns, to_draw) < self.caption_dropout
            encoded.append(self._encode(row_turns, *blocks, lost))
            kept += range(first_read + encoded[-1].lost, first_read + len(to_read))
            first_read, first_drawn = first_read + len(to_read), first_drawn + len(to_draw)
        length = max(len(row.input_ids) for row in encoded)

        def padded(name: str, value: int) -> torch.Tensor:
            return torch.tensor([getattr(row, name) + [value] * (length - len(row.input_ids)) for row in encoded])

        batch = {
            "input_ids": padded("input_ids", self.processor.tokenizer.pad_token_id),
            "attention_mask": torch.tensor([[1] * len(row.input_ids) + [0] * (length - len(row.input_ids)) for row in encoded]),
            "labels": padded("labels", -100),
        }
        if kept:
            batch |= {name: value[kept] for name, value in read.items()}
        if drawn:
            batch |= {f"drawn_{name}": value for name, value in drawn.items()}
            batch["drawn_mask"] = padded("drawn_mask", 0).bool()
        return batch

    def _images(self, row: dict[str, Any], turns: list[_Turn]) -> tuple[list, list]:
        """The images of a row that are to read, and those to draw: pictures, or their packed latents."""
        images = row.get("images") or []
        to_draw = [turn.assistant for turn in turns for _ in range(turn.text.count(self.processor.image_token))]
        if len(images) != len(to_draw):
            raise InputError(
                f"{len(images)} image(s) for {len(to_draw)} image part(s) in the messages; expected as many of both."
            )
        for image in images:
            mode = getattr(image, "mode", None)
            if mode != "RGB":
                raise InputError(
                    f"An image of mode {mode!r} ({type(image).__name__}); expected a PIL image of mode 'RGB'. "
                    "Convert it: image.convert('RGB')."
                )
        read = [image for image, draw in zip(images, to_draw, strict=True) if not draw]
        return read, [image for image, draw in zip(row.get("latents") or images, to_draw, strict=True) if draw]

    def _coin(self, turns: list[_Turn], drawn: list) -> float:
        """A number from 0 up to 1 that a row's words and drawn images decide, another one each epoch."""
        digest = blake2b(f"{self.epoch} {[turn.text for turn in turns]}".encode(), digest_size=8)
        for image in drawn:
            digest.update(image["values"] if isinstance(image, dict) else image.tobytes())
        return int.from_bytes(digest.digest(), "big") / 2**64

    def _pixels(self, images: list) -> dict[str, torch.Tensor]:
        """pixel_values, and image_sizes where the processor gives them; nothing where there are no images."""
        if not images:
            return {}
        prepared = self.processor.image_processor(images, return_tensors="pt")
        return {name: prepared[name] for name in ("pixel_values", "image_sizes") if name in prepared}

    def _latents(self, packed: list[dict]) -> dict[str, torch.Tensor]:
        """The same of packed latents: latents (M, T, C), and image_sizes."""
        latents = [unpack_latents(image, self.config.base_geometry["code_width"]) for image in packed]
        sizes = {} if self.config.base_geometry["image_size"] else {"image_sizes": torch.tensor([p["size"] for p in packed])}
        return {"latents": pad_sequence(latents, batch_first=True), **sizes}

    def _blocks(self, pixels: dict[str, torch.Tensor], first: int, count: int) -> list[str]:
        """The text of each of `count` images, from the first: its placeholders, and what frames them."""
        return [self.processor.replace_image_token(pixels, index) for index in range(first, first + count)]

    def _drawn_blocks(self, pixels: dict[str, torch.Tensor], first: int, count: int) -> list[str]:
        """The same of images to draw, whose global tokens may be fewer: they stand in front of the other placeholders."""
        token, config = self.processor.image_token, self.config
        read, drawn = token * (config.num_global_tokens + 1), token * (config.num_global_codes + 1)
        return [block.replace(read, drawn, 1) for block in self._blocks(pixels, first, count)]

    def _encode(self, turns: list[_Turn], read: list[str], drawn: list[str], caption_lost: bool) -> _Row:
        """Token ids, labels and drawn places of one row, from its turns and the texts of its images."""
        tokenizer = self.processor.tokenizer
        image_id, begin_id = tokenizer.convert_tokens_to_ids([self.processor.image_token, self.processor.image_start_token])
        text, learned, to_read, to_draw = self._expand(turns, iter(read), iter(drawn))
        laid_out = self.processor.prepare_inputs_layout(text=[text])[1][0]  # some put the begin of the sequence in front
        shift = len(laid_out) - len(text)
        encoding = tokenizer(laid_out, return_offsets_mapping=True)
        ids, starts = encoding["input_ids"], [start - shift for start, _ in encoding["offset_mapping"]]

        def tokens_in(span: tuple[int, int]) -> list[int]:
            return [index for index, start in enumerate(starts) if span[0] <= start < span[1]]

        labels, drawn_mask = [-100] * len(ids), [0] * len(ids)
        for span in learned:
            for index in tokens_in(span):
                labels[index] = ids[index]
        for span in to_draw:
            places = [index for index in tokens_in(span) if ids[index] == image_id]
            for index in tokens_in(span):
                drawn_mask[index] = int(ids[index] == image_id)
                if ids[index] != image_id or index == places[self.config.num_global_codes]:  # the separator
                    labels[index] = -100
        lost = 0
        if caption_lost:
            first = to_draw[0][0]
            for index in range(tokens_in(to_draw[0])[0]):
                labels[index] = -100
                if ids[index] not in (tokenizer.bos_token_id, begin_id):
                    ids[index] = tokenizer.pad_token_id
            lost = sum(start < first for start, _ in to_read)
        return _Row(ids, labels, drawn_mask, lost)

    def _expand(
        self, turns: list[_Turn], read: Iterator[str], drawn: Iterator[str]
    ) -> tuple[str, list[Span], list[Span], list[Span]]:
        """The row's text with its images' texts in it, and the spans of what is learned, and of images to read and to draw."""
        text, learned, to_read, to_draw = "", [], [], []
        for turn in turns:
            start, (first, *others) = len(text), turn.text.split(self.processor.image_token)
            text += first
            for words in others:
                block = next(drawn if turn.assistant else read)
                (to_draw if turn.assistant else to_read).append((len(text), len(text) + len(block)))
                text += block + words
            if turn.assistant:
                learned.append((start, len(text)))
        return text, learned, to_read, to_draw

    def _render(self, messages: list[dict]) -> list[_Turn]:
        """The chat template's words of each turn, those that ask the assistant to begin apart; images are still one token."""
        turns, done = [], ""
        for index, message in enumerate(messages):
            assistant = message["role"] == "assistant"
            if assistant:
                prompt = self._template(messages[:index], done, add_generation_prompt=True)
                turns.append(_Turn(prompt[len(done) :], False))
                done = prompt
            full = self._template(messages[: index + 1], done)
            text = full[len(done) :]
            if assistant and text.lstrip().startswith(self.processor.image_token):
                text = text.lstrip()  # drawing starts right behind the generation prompt: no blank before the image's begin
            turns.append(_Turn(text, assistant))
            done = full
        return turns

    def _template(self, messages: list[dict], done: str, **kwargs) -> str:
        text = self.processor.apply_chat_template(messages, tokenize=False, **kwargs)
        if not text.startswith(done):
            raise InputError(
                "The processor's chat template changes what it wrote when a turn is added; expected one that only appends. "
                "Pass the conversation up to the turn to learn, or use the base's own template."
            )
        return text
