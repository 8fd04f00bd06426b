"""The collator: an image in a user turn is read, an image in an assistant turn is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import ProcessorMixin

from .config import UniCompressConfig
from .errors import InputError


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

    Args:
        processor: The adapter's processor: `AutoProcessor.from_pretrained(adapter)`, or `model.compact_processor(processor)`.
        config: The adapter's config.
        caption_dropout: Share of drawing rows whose prompt is replaced by padding, so that classifier-free guidance has
            its unconditional model. Default 0.1.

    Raises:
        InputError: An empty batch, images that are not RGB, or more or fewer images than the messages mention.
    """

    processor: ProcessorMixin
    config: UniCompressConfig
    caption_dropout: float = 0.1

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Rows -> input_ids, attention_mask, labels, drawn_mask (B, L), pixel_values (N, 3, H, W), drawn_pixel_values (M, ...).

        Where images have any size, also image_sizes (N, 2) and drawn_image_sizes (M, 2), in pixels.
        """
        if not rows:
            raise InputError("An empty batch; expected at least one row of {'messages': [...], 'images': [...]}.")
        images = [self._images(row) for row in rows]  # to read and to draw, of each row
        read = self._pixels([image for to_read, _ in images for image in to_read])
        drawn = self._pixels([image for _, to_draw in images for image in to_draw])
        encoded, kept, first_read, first_drawn = [], [], 0, 0
        for row, (to_read, to_draw) in zip(rows, images, strict=True):
            last = first_read + len(to_read)
            blocks = self._blocks(read, first_read, len(to_read)), self._blocks(drawn, first_drawn, len(to_draw))
            encoded.append(self._encode(row["messages"], *blocks))
            kept += range(first_read + encoded[-1].lost, last)
            first_read, first_drawn = last, first_drawn + len(to_draw)
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

    def _images(self, row: dict[str, Any]) -> tuple[list, list]:
        """The images of a row that are to read, and those to draw."""
        parts = [
            message["role"]
            for message in row["messages"]
            for part in ([] if isinstance(message["content"], str) else message["content"])
            if part["type"] == "image"
        ]
        images = row.get("images") or []
        if len(images) != len(parts):
            raise InputError(
                f"{len(images)} image(s) for {len(parts)} image part(s) in the messages; expected as many of both."
            )
        for image in images:
            mode = getattr(image, "mode", None)
            if mode != "RGB":
                raise InputError(
                    f"An image of mode {mode!r} ({type(image).__name__}); expected a PIL image of mode 'RGB'. "
                    "Convert it: image.convert('RGB')."
                )
        read = [image for image, role in zip(images, parts, strict=True) if role != "assistant"]
        return read, [image for image, role in zip(images, parts, strict=True) if role == "assistant"]

    def _pixels(self, images: list) -> dict[str, torch.Tensor]:
        """pixel_values, and image_sizes where the processor gives them; nothing where there are no images."""
        if not images:
            return {}
        prepared = self.processor.image_processor(images, return_tensors="pt")
        return {name: prepared[name] for name in ("pixel_values", "image_sizes") if name in prepared}

    def _blocks(self, pixels: dict[str, torch.Tensor], first: int, count: int) -> list[str]:
        """The text of each of `count` images, from the first: its placeholders, and what frames them."""
        return [self.processor.replace_image_token(pixels, index) for index in range(first, first + count)]

    def _encode(self, messages: list[dict], read: list[str], drawn: list[str]) -> _Row:
        """Token ids, labels and drawn places of one row, from its messages and the texts of its images."""
        tokenizer, image_id = (
            self.processor.tokenizer,
            self.processor.tokenizer.convert_tokens_to_ids(self.processor.image_token),
        )
        text, learned, blocks = self._render(messages, list(read), list(drawn))
        laid_out = self.processor.prepare_inputs_layout(text=[text])[1][0]  # some put the begin of the sequence in front
        shift = len(laid_out) - len(text)
        encoding = tokenizer(laid_out, return_offsets_mapping=True)
        ids, starts = encoding["input_ids"], [start - shift for start, _ in encoding["offset_mapping"]]
        labels = [
            token if any(first <= start < last for first, last in learned) else -100
            for token, start in zip(ids, starts, strict=True)
        ]
        drawn_mask = [0] * len(ids)
        first_drawn = None
        for first, last, to_draw in blocks:
            tokens = [index for index, start in enumerate(starts) if first <= start < last]
            places = [index for index in tokens if ids[index] == image_id]
            if not to_draw:
                continue
            first_drawn = tokens[0] if first_drawn is None else first_drawn
            for index in tokens:
                drawn_mask[index] = int(ids[index] == image_id)
                if ids[index] != image_id or index == places[self.config.num_global_tokens]:  # the separator
                    labels[index] = -100
        lost = 0
        if drawn and torch.rand(()) < self.caption_dropout:
            kept = {tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids(self.processor.image_start_token)}
            for index in range(first_drawn):
                labels[index] = -100
                if ids[index] not in kept:
                    ids[index] = tokenizer.pad_token_id
            lost = sum(not to_draw for first, _, to_draw in blocks if first < starts[first_drawn])
        return _Row(ids, labels, drawn_mask, lost)

    def _render(
        self, messages: list[dict], read: list[str], drawn: list[str]
    ) -> tuple[str, list[tuple[int, int]], list[tuple[int, int, bool]]]:
        """The row's text with placeholders, the character spans of its assistant turns, and those of its images: first, last
        and whether to draw."""
        text, done, learned, blocks = "", "", [], []

        def add(piece: str, images: list[str], to_draw: bool) -> None:
            nonlocal text
            for index, words in enumerate(piece.split(self.processor.image_token)):
                if index:
                    block = images.pop(0)
                    blocks.append((len(text), len(text) + len(block), to_draw))
                    text += block
                text += words

        for index, message in enumerate(messages):
            assistant = message["role"] == "assistant"
            if assistant:
                prompt = self._template(messages[:index], done, add_generation_prompt=True)
                add(prompt[len(done) :], read, False)
                done = prompt
            full = self._template(messages[: index + 1], done)
            piece, start = full[len(done) :], len(text)
            if assistant:
                # Drawing starts right behind the generation prompt: no blank between it and the image's begin
                piece = piece.lstrip() if piece.lstrip().startswith(self.processor.image_token) else piece
            add(piece, drawn if assistant else read, assistant)
            if assistant:
                learned.append((start, len(text)))
            done = full
        return text, learned, blocks

    def _template(self, messages: list[dict], done: str, **kwargs) -> str:
        text = self.processor.apply_chat_template(messages, tokenize=False, **kwargs)
        if not text.startswith(done):
            raise InputError(
                "The processor's chat template changes what it wrote when a turn is added; expected one that only appends. "
                "Pass the conversation up to the turn to learn, or use the base's own template."
            )
        return text
