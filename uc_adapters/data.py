"""The collator: an image in a user turn is read, an image in an assistant turn is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin

from .caption_dropout import CaptionDropout
from .completions import Completion, completions
from .config import UniCompressConfig
from .errors import InputError
from .images import unpack_latents
from .messages import malformed, normalised
from .sequences import DrawnImage, Sequence, SequenceWriter


@dataclass
class UniCompressCollator:
    """Batches of TRL's conversational vision format, `{"messages": [...], "images": [...]}`, for `UniCompressModel`.

    Assistant turns are learned, answers and drawings, each behind the prompt that inference makes of the conversation up to
    there: `processor(text=apply_chat_template(..., add_generation_prompt=True), images=...)`, with `generation_mode="image"`
    where an image is drawn. Prompts that continue one another share a sequence of the batch. Others have a sequence each: an
    image that was drawn is read in the prompts behind it, and a base may begin prompts for answers and for drawings
    differently. A row may thus become several sequences.

    Every answer and every drawing ends, once, in a token that ends generation, whatever the chat template writes there. What
    wraps an image (its begin and end, its size, its row ends) is not learned, nor is the separator.

    A content may be a plain string; `<image>` in it is the place of an image, see `uc_adapters.messages.normalised`. A row may
    bring `given`, how many of its leading turns are context only, and `latents`, one entry of
    `uc_adapters.images.pack_latents` an image (None for one that is only read): images to draw are then not encoded again.

    Args:
        processor: The adapter's processor: `AutoProcessor.from_pretrained(adapter)`, or `model.compact_processor(processor)`.
        config: The adapter's config.
        caption_dropout: Share of drawings whose prompt is replaced by padding, so that classifier-free guidance has its
            unconditional model. Default 0.1. See `epoch`.
        eos_token_id: The tokens that end generation, as in the base's `generation_config`. Default: the tokenizer's.

    Raises:
        InputError: A share outside [0, 1], a processor without an end token or of no known family; an empty batch; a row that
            is named, with what is wrong in it: no messages, images that are not RGB, more or fewer images than the messages
            have places for, special tokens in a text, a conversation that the chat template cannot write.
    """

    processor: ProcessorMixin
    config: UniCompressConfig
    caption_dropout: float = 0.1
    eos_token_id: int | list[int] | None = None

    def __post_init__(self):
        self.dropout = CaptionDropout(self.caption_dropout)
        own = self.processor.tokenizer.eos_token_id
        ends = own if self.eos_token_id is None else self.eos_token_id
        self.ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if not self.ends:
            raise InputError(
                "The processor's tokenizer has no eos_token; expected one: every answer is learned with its end. Set "
                "processor.tokenizer.eos_token, or pass eos_token_id=model.generation_config.eos_token_id."
            )
        end = own if own in self.ends else self.ends[0]
        self.writer = SequenceWriter(self.processor, self.ends, end, self.config.num_global_codes)

    @property
    def epoch(self) -> int | None:
        """Other prompts are dropped in another epoch. A trainer sets it; None: it is counted, by the rows that come back."""
        return self.dropout.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self.dropout.epoch = epoch

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Rows -> input_ids, attention_mask, labels, gen_mask (B, L), pixel_values (N, 3, H, W), gen_pixel_values (M, ...).

        B is the number of sequences. With latents, gen_latents (M, T, C) in place of the last. Where images have any size,
        also image_sizes (N, 2) and gen_image_sizes (M, 2), in pixels.
        """
        return self.with_rows(rows)[0]

    def with_rows(self, rows: list[dict[str, Any]]) -> tuple[dict[str, torch.Tensor], list[int]]:
        """The batch, and the row that each of its sequences was made of."""
        if not rows:
            raise InputError("An empty batch; expected at least one row of {'messages': [...], 'images': [...]}.")
        images, learned = [], []
        for index, row in enumerate(rows):
            with _naming(row, index):
                images.append(_images(row))
                learned.append(self._completions(row, len(images[-1])))
        counts = [max(one.images for one in of_row) for of_row in learned]  # read of each row: its first ones
        firsts = [sum(counts[:index]) for index in range(len(rows))]
        read = self._pixels([image for of_row, count in zip(images, counts, strict=True) for image in of_row[:count]])
        to_draw = [
            (row.get("latents") or of_row)[one.images]
            for row, of_row, of_learned in zip(rows, images, learned, strict=True)
            for one in of_learned
            if one.words is None
        ]
        drawn = self._latents(to_draw) if to_draw and isinstance(to_draw[0], dict) else self._pixels(to_draw)
        sequences, places, drawings = [], [], self._drawn_images(drawn, to_draw)
        for index, of_row in enumerate(learned):
            blocks = [self.processor.replace_image_token(read, firsts[index] + place) for place in range(counts[index])]
            written = self.writer.write(of_row, blocks, drawings, self.dropout)
            places += [(index, place) for one in written for place in range(one.read)]
            sequences += [(index, one) for one in written]
        batch, gen_mask = self._padded([one for _, one in sequences])
        if places:
            batch |= {name: value[[firsts[row] + place for row, place in places]] for name, value in read.items()}
        if drawn:
            batch |= {f"gen_{name}": value for name, value in drawn.items()} | {"gen_mask": gen_mask}
        return batch, [row for row, _ in sequences]

    def _completions(self, row: dict[str, Any], images: int) -> list[Completion]:
        """What a row has to say.

        Raises:
            InputError: Something is wrong with it.
        """
        if "messages" not in row:
            raise InputError(f"A row of {', '.join(row)}; expected messages, and images where they have any.")
        processor, messages, given = self.processor, normalised(row["messages"], images), row.get("given") or 0
        if wrong := malformed(messages, processor):
            raise InputError(f"{wrong}.")
        count = sum(part["type"] == "image" for turn in messages for part in turn["content"])
        if images != count:
            raise InputError(f"{images} image(s) for {count} image part(s) in the messages; expected as many of both.")
        answers = [part for turn in messages[given:] if turn["role"] == "assistant" for part in turn["content"]]
        for end in processor.tokenizer.convert_ids_to_tokens(self.ends):
            if any(end in (part.get("text") or "") for part in answers):
                raise InputError(f"An answer has {end} in its text, which ends generation. Take it out: it is added.")
        learned = completions(processor, messages, given)
        if not learned:
            raise InputError("Nothing to learn; expected an assistant turn with words or an image.")
        return learned

    def _drawn_images(self, drawn: dict[str, torch.Tensor], images: list) -> Iterator[DrawnImage]:
        """The texts of images to draw. Their global tokens may be fewer than those that are read, and stand in front."""
        token, config = self.processor.image_token, self.config
        of_read, of_drawn = token * (config.num_global_tokens + 1), token * (config.num_global_codes + 1)
        for index, image in enumerate(images):
            block = self.processor.replace_image_token(drawn, index).replace(of_read, of_drawn, 1)
            begin, first, rest = block.partition(token)
            yield DrawnImage(begin, first + rest, image["values"] if isinstance(image, dict) else image.tobytes())

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

    def _padded(self, sequences: list[Sequence]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Sequences of one length, padded on the right, and the places of what is drawn in them: (B, L) each."""
        length = max(len(one.ids) for one in sequences)

        def padded(name: str, value: int) -> torch.Tensor:
            return torch.tensor([getattr(one, name) + [value] * (length - len(one.ids)) for one in sequences])

        batch = {
            "input_ids": padded("ids", self.processor.tokenizer.pad_token_id),
            "attention_mask": torch.tensor([[1] * len(one.ids) + [0] * (length - len(one.ids)) for one in sequences]),
            "labels": padded("labels", -100),
        }
        return batch, padded("drawn", False)


@contextmanager
def _naming(row: dict[str, Any], index: int) -> Iterator[None]:
    """Names the row in an error about it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{row.get('origin') or f'Row {index + 1} of the batch'}: {error}") from error


def _images(row: dict[str, Any]) -> list:
    images = row.get("images") or []
    for image in images:
        mode = getattr(image, "mode", None)
        if mode != "RGB":
            raise InputError(
                f"An image of mode {mode!r} ({type(image).__name__}); expected a PIL image of mode 'RGB'. "
                "Convert it: image.convert('RGB')."
            )
    return images
