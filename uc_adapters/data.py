"""The collator: an image in a user turn is read, an image in an assistant turn is drawn."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin

from .chance import Chance
from .completions import Completion, completions
from .config import UniCompressConfig
from .errors import InputError
from .images import in_order, unpack_latents
from .messages import malformed, normalised
from .sequences import DrawnImage, Sequence, SequenceWriter


@dataclass
class UniCompressCollator:
    """Makes batches for `UniCompressModel` from rows in TRL's conversational vision format.

    A row is `{"messages": [...], "images": [...]}`. The model learns the answers and the drawings of the assistant turns. Each
    follows the prompt that inference makes of the conversation so far:
    `processor(text=apply_chat_template(..., add_generation_prompt=True), images=...)`, with `generation_mode="image"` before a
    drawing. Prompts that continue one another share one sequence of the batch. Other prompts have a sequence each: later
    prompts read a drawn image, and a base may begin prompts for answers and prompts for drawings differently. So a row may
    become several sequences.

    Every answer and every drawing ends with exactly one token that ends generation, whatever the chat template writes there.
    The wrapper tokens of an image (its begin and end, its size, its EOL tokens) and the separator are not learned.

    The content of a turn may be a plain string. `<image>` in it marks the position of an image, see
    `uc_adapters.messages.normalised`. A row may also have `given`, the number of leading turns that are context only. And it
    may have `latents`, one entry of `uc_adapters.images.pack_latents` for each image (None for one that is only read), so that
    the images to draw are not encoded again. And `occurrence`, whatever tells a row that comes several times in an epoch apart
    from its repeats: without it, all of them lose their caption, or none. `JointTrainer` adds it.

    Args:
        processor: The adapter's processor: `AutoProcessor.from_pretrained(adapter)`, or `model.compact_processor(processor)`.
        config: The adapter's config.
        caption_dropout: The share of drawings whose prompt is replaced by padding. From them the model learns the unconditional
            case for classifier-free guidance. Default 0.1. See `epoch`.
        eos_token_id: The tokens that end generation, as in the base's `generation_config`. Default: the tokenizer's.
        codes_per_step: The number of codes in a step of the images to draw. Default: if the adapter is trained for several, one
            of them for each drawing, each as often as its number: 8 codes in a step come twice as often as 4, and each number
            gets as many steps. The choice depends on the image, its row's `occurrence` and `epoch` alone, however the rows are
            batched.
        stride: The stride at which images are read. Default: chosen likewise, one for each batch.

    Raises:
        InputError: `caption_dropout` is outside [0, 1], the adapter is not trained for `codes_per_step` or `stride`, the
            processor has no end token or belongs to no known family, the batch is empty, or a row is bad: it has no messages,
            images that are not RGB, more or fewer images than its messages have image parts, special tokens in a text, or a
            conversation that the chat template cannot write. The message names the row.
    """

    processor: ProcessorMixin
    config: UniCompressConfig
    caption_dropout: float = 0.1
    eos_token_id: int | list[int] | None = None
    codes_per_step: int | None = None
    stride: int | None = None

    def __post_init__(self):
        self.config.strip_length(self.codes_per_step)  # raises InputError if the adapter is not trained for it
        self.config.read_stride(self.stride)
        if not 0 <= self.caption_dropout <= 1:
            raise InputError(f"caption_dropout={self.caption_dropout}; expected a share from 0 to 1.")
        self.chance = Chance()
        own = self.processor.tokenizer.eos_token_id
        ends = own if self.eos_token_id is None else self.eos_token_id
        self.ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if not self.ends:
            raise InputError(
                "The processor's tokenizer has no eos_token; expected one: every answer is learned with its end. Set "
                "processor.tokenizer.eos_token, or pass eos_token_id=model.generation_config.eos_token_id."
            )
        end = own if own in self.ends else self.ends[0]
        self.writer = SequenceWriter(self.processor, self.ends, end)

    @property
    def epoch(self) -> int | None:
        """The epoch, which decides all choices by chance. A trainer sets it. If None, repeated rows mark a new epoch."""
        return self.chance.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self.chance.epoch = epoch

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Makes a batch of rows.

        Returns:
            `input_ids`, `attention_mask` and `labels`, (B, L); `pixel_values` (N, 3, H, W) if there are images to read;
            `gen_mask` (B, L) and `gen_pixel_values` (M, 3, H, W) if there are images to draw. B is the number of sequences.
            Rows with latents give `gen_latents` (M, T, C) in place of `gen_pixel_values`. If the base takes images of any size,
            there are also `image_sizes` (N, 2) and `gen_image_sizes` (M, 2), in pixels. If the adapter is trained for several
            numbers of codes in a step, `gen_codes_per_step` (M,) is that of each image to draw.
        """
        return self.with_rows(rows)[0]

    def with_rows(self, rows: list[dict[str, Any]]) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Returns the batch, and for each of its sequences the index of the row that it was made of."""
        if not rows:
            raise InputError("Got an empty batch; expected at least one row of {'messages': [...], 'images': [...]}.")
        family = self.writer.family
        images, learned = [], []
        for index, row in enumerate(rows):
            with _naming(row, index):
                images.append(_images(row))
                learned.append(self._completions(row, len(images[-1])))
        repeats = [str(row.get("occurrence", "")).encode() for row in rows]
        if self.epoch is None and (self.caption_dropout or len(self._lengths) > 1 or len(self._strides) > 1):
            for row_images, of_row, repeat in zip(images, learned, repeats, strict=True):
                words = "".join(f"{completion.prompt}{completion.words}" for completion in of_row)
                self.chance.count(b"".join([words.encode(), *map(_content, row_images), repeat]))
        counts = [max(completion.images for completion in of_row) for of_row in learned]  # each row's first images are read
        firsts = [sum(counts[:index]) for index in range(len(rows))]
        read = self._pixels([image for of_row, count in zip(images, counts, strict=True) for image in of_row[:count]])
        drawn_completions = [
            ((row.get("latents") or row_images)[completion.images], completion.images == 0, repeat)
            for row, row_images, of_row, repeat in zip(rows, images, learned, repeats, strict=True)
            for completion in of_row
            if completion.words is None
        ]
        to_draw, alone, repeats_drawn = zip(*drawn_completions, strict=True) if drawn_completions else ((), (), ())
        packed = to_draw and isinstance(to_draw[0], dict)
        drawn, counts_drawn = (self._latents if packed else self._drawn_pixels)(to_draw, alone)
        contents = [_content(image) + repeat for image, repeat in zip(to_draw, repeats_drawn, strict=True)]
        lengths = [self._chosen(self._lengths, [content]) for content in contents]
        stride = self._chosen(self._strides, chain(map(_content, chain.from_iterable(images)), repeats))
        sequences, places, drawings = [], [], self._drawn_images(drawn, counts_drawn, contents, lengths)
        for index, of_row in enumerate(learned):
            texts = [family.reading_text(self.processor, read, firsts[index] + place) for place in range(counts[index])]
            texts = [self._as_read(text, stride) for text in texts]
            written = self.writer.write(of_row, texts, drawings, self._drops)
            places += [(index, place) for sequence in written for place in range(sequence.read)]
            sequences += [(index, sequence) for sequence in written]
        batch, gen_mask = self._padded([sequence for _, sequence in sequences])
        if places:
            batch |= {name: value[[firsts[row] + place for row, place in places]] for name, value in read.items()}
        if drawn:
            batch |= {f"gen_{name}": value for name, value in drawn.items()} | {"gen_mask": gen_mask}
            if len(self.config.strip_lengths) > 1:
                batch["gen_codes_per_step"] = torch.tensor(lengths).repeat_interleave(torch.tensor(counts_drawn))
        return batch, [row for row, _ in sequences]

    def without_chance(self) -> UniCompressCollator:
        """Returns a copy for evaluation. It drops no caption, and has one ratio: the one in the middle, if none is set."""
        config = self.config
        length = config.strip_length(self.codes_per_step) if config.decompressor == "strip" else None
        return replace(self, caption_dropout=0.0, codes_per_step=length, stride=config.read_stride(self.stride))

    def _completions(self, row: dict[str, Any], images: int) -> list[Completion]:
        """Returns the completions of a row with `images` images.

        Raises:
            InputError: Something is wrong with the row.
        """
        if "messages" not in row:
            raise InputError(
                f"A row of {', '.join(row)}; expected messages, and images if a turn has an image part. Rename the columns."
            )
        processor, messages, given = self.processor, normalised(row["messages"], images), row.get("given") or 0
        if wrong := malformed(messages, processor):
            raise InputError(f"{wrong}.")
        count = sum(part["type"] == "image" for turn in messages for part in turn["content"])
        if images != count:
            raise InputError(
                f"{images} image(s) for {count} image part(s) in the messages; expected as many of both. Add or remove images."
            )
        answers = [part for turn in messages[given:] if turn["role"] == "assistant" for part in turn["content"]]
        for end in processor.tokenizer.convert_ids_to_tokens(self.ends):
            if any(end in (part.get("text") or "") for part in answers):
                raise InputError(
                    f"An answer has {end} in its text, a token that ends generation; expected a text without it. Remove it: "
                    "the collator adds it."
                )
        learned = completions(processor, messages, given)
        why_no_answers = self.writer.family.why_no_answers
        if why_no_answers is not None and any(completion.words is not None for completion in learned):
            raise InputError(
                f"An assistant turn has a text, and a {self.writer.family.model_type} base cannot answer: {why_no_answers}; "
                "expected images to draw alone. Remove the text, or leave the row out."
            )
        if not learned:
            raise InputError(
                "Nothing to learn; expected an assistant turn with a text or an image. Add one, or leave the row out."
            )
        return learned

    @property
    def _lengths(self) -> tuple[int, ...]:
        """The numbers of codes in a step to choose among."""
        return self.config.strip_lengths if self.codes_per_step is None else (self.codes_per_step,)

    @property
    def _strides(self) -> tuple[int, ...]:
        """The strides to choose among."""
        return self.config.strides if self.stride is None else (self.stride,)

    def _drops(self, prompt: bytes) -> bool:
        """Returns whether a drawing loses its prompt: its text, the content of the image to draw, and the row's occurrence."""
        return self.chance.happens(self.caption_dropout, prompt)

    def _chosen(self, ratios: tuple[int, ...], contents: Iterable[bytes]) -> int:
        """Returns one of the ratios for what has these contents, the larger ones more often, since longer steps are harder."""
        return ratios[0] if len(ratios) == 1 else self.chance.one_of(ratios, b"".join(contents))

    def _drawn_images(
        self, drawn: dict[str, torch.Tensor], counts: list[int], contents: list[bytes], lengths: list[int]
    ) -> Iterator[DrawnImage]:
        """Yields the texts of the drawings. The lists have an entry for each: its number of images, content, codes in a step.

        A drawing has two images in `drawn` if it begins with a preview.
        """
        token, config, first = self.processor.image_token, self.config, 0
        for count, content, length in zip(counts, contents, lengths, strict=True):
            texts = self.writer.family.drawing_texts(self.processor, drawn, first, count)
            texts, first = [self._as_drawn(text, length) for text in texts], first + count
            ends = list(accumulate(text.count(token) for text in texts))
            given = range(config.num_global_codes, config.num_drawing_globals + 1)  # of each image's placeholders
            given = [end + place for end in [0, *ends[:-1]] for place in given]
            begin, placeholder, rest = "".join(texts).partition(token)
            yield DrawnImage(begin, placeholder + rest, given, content)

    @cached_property
    def _written_stride(self) -> int:
        """The stride of the processor, which has one of those that are trained."""
        config = self.config
        if len(config.strides) == 1:
            return config.read_stride()
        side = config.base_geometry["read_side"]  # with several strides, images have one size
        count = self.writer.family.reading_text(self.processor, {}, 0).count(self.processor.image_token)
        counts = {config.num_image_tokens((side, side), stride): stride for stride in config.strides}
        if count not in counts:
            raise InputError(
                f"The processor writes {count} placeholders for an image; expected {' or '.join(map(str, counts))}. Make it "
                "with model.compact_processor(processor)."
            )
        return counts[count]

    def _as_read(self, text: str, stride: int) -> str:
        """Replaces the placeholders in the processor's text of an image by those of an image that is read at `stride`."""
        if stride == self._written_stride:
            return text
        token, side = self.processor.image_token, self.config.base_geometry["read_side"]
        count = self.config.num_image_tokens((side, side), stride)
        return text[: text.index(token)] + token * count + text[text.rindex(token) + len(token) :]

    def _as_drawn(self, text: str, in_step: int) -> str:
        """Replaces the placeholders in the processor's text of an image by those of an image to draw.

        These are the global tokens, the separator, and the steps of `in_step` codes. `StripHead.steps_in_row` says where EOL
        tokens follow.
        """
        token, config = self.processor.image_token, self.config
        codes = self._written_stride**2 if self.writer.family.compresses_reading else 1  # of a placeholder in the text
        if config.num_drawing_globals == config.num_global_tokens and in_step == codes:
            return text
        first, last = text.index(token), text.rindex(token) + len(token)
        _, *ends = re.split(f"(?:{re.escape(token)})+", text[first:last])  # after each row of placeholders; the last is empty
        count = text.count(token) - config.num_global_tokens - 1
        steps, in_row = math.ceil(codes * count / in_step), math.lcm(codes * count // len(ends), in_step) // in_step
        rows = [token * min(in_row, steps - done) for done in range(0, steps, in_row)]
        return text[:first] + token * (config.num_drawing_globals + 1) + ends[0].join(rows) + text[last:]

    def _pixels(self, images: list) -> dict[str, torch.Tensor]:
        """Returns `pixel_values`, and `image_sizes` if the processor gives them; an empty dict if there are no images."""
        return self.writer.family.image_inputs(self.processor, images) if images else {}

    def _drawn_pixels(self, images: tuple, alone: tuple[bool, ...]) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Returns the pixels of the images to draw, each after its preview if it has one, and their number in each drawing.

        `alone` tells which drawings have prompts without images: only these have previews.
        """
        drawn = self._pixels(list(images))
        with_preview = [index for index, is_alone in enumerate(alone) if is_alone]
        chosen = [images[index] for index in with_preview]
        previews = self.writer.family.preview_inputs(self.processor, chosen) if chosen else None
        if previews is None:
            return drawn, [1] * len(images)
        preview_of = {index: number for number, index in enumerate(with_preview)}
        order = []
        for index in range(len(images)):
            order += [(0, preview_of[index]), (1, index)] if index in preview_of else [(1, index)]
        return in_order([previews, drawn], order), [2 if is_alone else 1 for is_alone in alone]

    def _latents(self, packed: tuple[dict, ...], alone: tuple[bool, ...]) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Returns the same from packed latents: `latents` (M, T, C), and `image_sizes` if images have any size."""
        unpacked = [unpack_latents(image, self.config.base_geometry["code_width"]) for image in packed]
        drawings = [parts if is_alone else parts[-1:] for parts, is_alone in zip(unpacked, alone, strict=True)]
        sizes, latents = zip(*chain.from_iterable(drawings), strict=True)
        any_size = {} if self.config.base_geometry["image_size"] else {"image_sizes": torch.tensor(sizes)}
        return {"latents": pad_sequence(latents, batch_first=True), **any_size}, [len(parts) for parts in drawings]

    def _padded(self, sequences: list[Sequence]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Pads the sequences on the right to one length; returns the batch, and the mask of the images to draw, (B, L)."""
        length = max(len(sequence.ids) for sequence in sequences)

        def padded(name: str, value: int) -> torch.Tensor:
            return torch.tensor([getattr(seq, name) + [value] * (length - len(seq.ids)) for seq in sequences])

        batch = {
            "input_ids": padded("ids", self.processor.tokenizer.pad_token_id),
            "attention_mask": torch.tensor([[1] * len(seq.ids) + [0] * (length - len(seq.ids)) for seq in sequences]),
            "labels": padded("labels", -100),
        }
        return batch, padded("drawn", False)


@contextmanager
def _naming(row: dict[str, Any], index: int) -> Iterator[None]:
    """Adds the name of the row to an `InputError` about it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{row.get('origin') or f'Row {index + 1} of the batch'}: {error}") from error


def _content(image: Any) -> bytes:
    """The bytes of an image, or of its packed latents."""
    return image["values"] if isinstance(image, dict) else image.tobytes()


def _images(row: dict[str, Any]) -> list:
    """Returns the images of a row; raises InputError if one is not RGB."""
    images = row.get("images") or []
    for image in images:
        mode = getattr(image, "mode", None)
        if mode != "RGB":
            raise InputError(
                f"An image of mode {mode!r} ({type(image).__name__}); expected a PIL image of mode 'RGB'. "
                "Convert it: image.convert('RGB')."
            )
    return images
