"""The collator: an image in a user turn is read, an image in an assistant turn is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import ProcessorMixin

from .config import UniCompressConfig
from .errors import InputError


@dataclass
class UniCompressCollator:
    """Batches of TRL's conversational vision format, `{"messages": [...], "images": [...]}`, for `UniCompressModel`.

    Assistant turns are learned: their words, and the places of their images. The begin and the end of an image are not,
    nor is the separator, which is never predicted.

    Args:
        processor: The adapter's processor: its `num_image_tokens` is the short count.
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
        """Rows -> input_ids, attention_mask, labels, drawn_mask (B, L), pixel_values (N, 3, S, S), drawn_pixel_values."""
        if not rows:
            raise InputError("An empty batch; expected at least one row of {'messages': [...], 'images': [...]}.")
        tokenizer = self.processor.tokenizer
        encoded = [self._encode(row) for row in rows]
        length = max(len(row["input_ids"]) for row in encoded)

        def padded(name: str, value: int) -> torch.Tensor:
            return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in encoded])

        batch = {
            "input_ids": padded("input_ids", tokenizer.pad_token_id),
            "attention_mask": torch.tensor(
                [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in encoded]
            ),
            "labels": padded("labels", -100),
        }
        read = [image for row in encoded for image in row["read"]]
        drawn = [image for row in encoded for image in row["drawn"]]
        if read:
            batch["pixel_values"] = self.processor.image_processor(read, return_tensors="pt")["pixel_values"]
        if drawn:
            batch["drawn_pixel_values"] = self.processor.image_processor(drawn, return_tensors="pt")["pixel_values"]
            batch["drawn_mask"] = padded("drawn_mask", 0).bool()
        return batch

    def _encode(self, row: dict[str, Any]) -> dict[str, list]:
        """Token ids, labels and drawn places of one row, unpadded, and its images by role."""
        text, learned, roles = self._render(row["messages"])
        images = row.get("images") or []
        if len(images) != len(roles):
            raise InputError(
                f"{len(images)} image(s) for {len(roles)} image part(s) in the messages; expected as many of both."
            )
        for image in images:
            mode = getattr(image, "mode", None)
            if mode != "RGB":
                raise InputError(
                    f"An image of mode {mode!r} ({type(image).__name__}); expected a PIL image of mode 'RGB'. "
                    "Convert it: image.convert('RGB')."
                )
        tokenizer = self.processor.tokenizer
        encoding = tokenizer(text, return_offsets_mapping=True)
        ids = encoding["input_ids"]
        image_id, begin_id, end_id = tokenizer.convert_tokens_to_ids(
            [self.processor.image_token, self.processor.image_start_token, self.processor.image_end_token]
        )
        taught = [any(start <= first < end for start, end in learned) for first, _ in encoding["offset_mapping"]]
        drawn_mask = [int(token == image_id and teach) for token, teach in zip(ids, taught, strict=True)]
        labels = [
            token if teach and token not in (begin_id, end_id) else -100 for token, teach in zip(ids, taught, strict=True)
        ]
        places = [index for index, mark in enumerate(drawn_mask) if mark]
        for separator in places[self.config.num_global_tokens :: self.processor.num_image_tokens]:
            labels[separator] = -100
        read = [image for image, role in zip(images, roles, strict=True) if role != "assistant"]
        drawn = [image for image, role in zip(images, roles, strict=True) if role == "assistant"]
        if drawn and torch.rand(()) < self.caption_dropout:
            first = places[0] - 1  # the first drawn image's begin
            blank = [index for index in range(first) if ids[index] not in (tokenizer.bos_token_id, begin_id)]
            lost = sum(ids[index] == image_id for index in blank) // self.processor.num_image_tokens
            read = read[lost:]
            for index in blank:
                ids[index], labels[index] = tokenizer.pad_token_id, -100
        return {"input_ids": ids, "labels": labels, "drawn_mask": drawn_mask, "read": read, "drawn": drawn}

    def _render(self, messages: list[dict]) -> tuple[str, list[tuple[int, int]], list[str]]:
        """The row's text with placeholders, the character spans of its assistant turns, and the role of each image."""
        text, done, learned, roles = "", "", [], []
        for index, message in enumerate(messages):
            assistant = message["role"] == "assistant"
            if assistant:
                prompt = self._template(messages[:index], done, add_generation_prompt=True)
                text += self._expand(prompt[len(done) :])
                done = prompt
            full = self._template(messages[: index + 1], done)
            piece = full[len(done) :]
            if assistant:
                # Drawing starts right behind the generation prompt: no blank between it and the image's begin
                piece = piece.lstrip() if piece.lstrip().startswith(self.processor.image_token) else piece
                learned.append((len(text), len(text) + len(self._expand(piece))))
            text += self._expand(piece)
            done = full
            roles += [message["role"]] * piece.count(self.processor.image_token)
        return text, learned, roles

    def _template(self, messages: list[dict], done: str, **kwargs) -> str:
        text = self.processor.apply_chat_template(messages, tokenize=False, **kwargs)
        if not text.startswith(done):
            raise InputError(
                "The processor's chat template changes what it wrote when a turn is added; expected one that only appends. "
                "Pass the conversation up to the turn to learn, or use the base's own template."
            )
        return text

    def _expand(self, text: str) -> str:
        return text.replace(self.processor.image_token, self.processor.replace_image_token({}, 0))
