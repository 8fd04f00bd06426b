"""The training pool of captioned images of any dataset for the tiny bases: its vocabulary, and a head that names words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from rows.conversations import DatasetError, conversations, decoded
from rows.turns import CAPTION_REQUEST
from sklearn.feature_extraction.text import CountVectorizer
from tiny_world.digits import IMAGE_SIZE
from tiny_world.scene_pool import ImagePool, NamingHead
from tiny_world.tiny_words import DIGITS, split_words
from torch import nn
from tqdm.auto import tqdm
from transformers import ProcessorMixin

CODE_SIZE = 8  # pixels per code, along one side of an image
LEAST_IMAGES = 48  # the batch size of the vision stage
MOST_WORDS = 4096  # words in the vocabulary
MOST_NAMES = 1024  # words and pairs of words that the head names


def captioned_rows(source: str, most: int, rng: np.random.Generator) -> Dataset:
    """Loads rows that draw an image from a caption: at most `most`, in random order, with a column "caption".

    Args:
        source: See `conversations`.

    Raises:
        DatasetError: There is nothing to load, or there are too few such rows.
    """
    dataset = conversations(source)
    captions, origins = [_caption(messages) for messages in dataset["messages"]], dataset["origin"][:]
    drawn = [index for index, caption in enumerate(captions) if caption]
    if len(drawn) < LEAST_IMAGES:
        raise DatasetError(
            f"{source} has {len(drawn)} images with a caption to draw them from; expected {LEAST_IMAGES} or more, as columns "
            "image + text, or as messages: a user turn of text, then an assistant turn that is an image."
        )
    left_out = set(origins) - {origins[index] for index in drawn}
    if left_out:
        tqdm.write(f"{len(left_out)} row(s) have no caption to draw an image from: left out (such as {min(left_out)}).")
    chosen = rng.permutation(drawn)[:most]
    return dataset.select(chosen).add_column("caption", [captions[index] for index in chosen])


def _caption(messages: list[dict] | None) -> str:
    """The caption that an image is drawn from; "" if the conversation is not one caption and its image."""
    turns = [(turn["role"], {part["type"] for part in turn["content"]}) for turn in messages or []]
    if turns != [("user", {"text"}), ("assistant", {"image"})]:
        return ""
    return " ".join(part["text"] or "" for part in messages[0]["content"]).strip()


def caption_words(captions: Iterable[str], most: int = MOST_WORDS) -> list[str]:
    """A vocabulary of at most `most` words: digits, the recipes' request, and the captions' words, frequent ones first."""
    counts = Counter(word for caption in captions for word in split_words(caption))
    known = dict.fromkeys([*DIGITS, ":", *split_words(CAPTION_REQUEST), *(word for word, _ in counts.most_common())])
    return list(known)[:most]


class CaptionPool(ImagePool):
    """Images with one caption each, resized by the processor, so that drawing and reading see the same pixels.

    Raises:
        DatasetError: An image cannot be opened, or the processor does not make it 64 x 64.
    """

    def __init__(self, rows: Dataset, processor: ProcessorMixin, rng: np.random.Generator):
        self.captions = list(rows["caption"])
        super().__init__(np.stack([_pixels(row, processor) for row in tqdm(rows, desc="resize images")]), rng)
        self.colour_weights = _colour_weights(self.pixels)
        names = CountVectorizer(
            tokenizer=split_words, token_pattern=None, ngram_range=(1, 2), max_features=MOST_NAMES, binary=True
        )
        self.named = torch.from_numpy(names.fit_transform(self.captions).toarray()).float()  # (N, names)

    def restoration_loss(self, restored: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """The reconstruction loss, with more weight on hue than on brightness, over pixels and over areas of one code.

        The tiny tokenizer's norms have one channel per group, which hides the brightness and the hue of an area. A plain pixel
        loss teaches it brightness alone, by which most pictures differ most, and it reconstructs grey shapes (CHANGELOG).
        """
        error = torch.einsum("dc,bchw->bdhw", self.colour_weights, restored - pixels)
        areas = F.avg_pool2d(error, CODE_SIZE)
        return error.square().mean() + areas.square().mean() + 0.3 * error.abs().mean()

    def conversation(self, row: int, image: str) -> str:
        """A conversation that asks for a description of the image and answers with its caption."""
        return f"<bos><|User|>: {image}{CAPTION_REQUEST}\n\n<|Assistant|>: {self.captions[row]}<eos>"

    def caption(self, row: int) -> str:
        return self.captions[row]

    def head(self, width: int) -> WordHead:
        return WordHead(width, self.named)


def _colour_weights(pixels: torch.Tensor) -> torch.Tensor:
    """Half of a whitening: a matrix (3, 3) that makes the variances of the colours of pixels (N, H, W, 3) more equal."""
    sample = pixels.flatten(0, 2)[:: max(1, pixels[..., 0].numel() // 100_000)].float() / 127.5 - 1  # (n, 3)
    variances, directions = torch.linalg.eigh(sample.T.cov() + 1e-3 * torch.eye(3))
    return directions @ torch.diag((variances / variances.mean()) ** -0.25) @ directions.T


def _pixels(row: dict, processor: ProcessorMixin) -> np.ndarray:
    """The pixels of a row's image as the processor makes them, (64, 64, 3) uint8."""
    try:
        (image,) = decoded(row)["images"]
        (pixels,) = processor.image_processor([image], return_tensors="pt")["pixel_values"]  # (3, H, W) in [-1, 1]
    except Exception as error:  # a damaged file can raise anything, from PIL or the processor
        raise DatasetError(f"{row['origin']}: {type(error).__name__}: {error}") from error
    height, width = pixels.shape[1:]
    if (height, width) != (IMAGE_SIZE, IMAGE_SIZE):
        raise DatasetError(
            f"{row['origin']}: the processor makes it {height} x {width}; expected a square image, which becomes 64 x 64. "
            "Crop it, or train --family janus, whose processor pads."
        )
    return ((pixels.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()


class WordHead(NamingHead):
    """Names the words of an image's caption, and the pairs of neighbouring words, which say what belongs together."""

    def __init__(self, width: int, named: torch.Tensor):
        super().__init__()
        self.named = named  # (N, names), 1 for each name in the caption
        self.names = nn.Linear(width, named.shape[1])
        share = (named.sum(0) + 1) / (len(named) + 2)
        with torch.no_grad():  # start from the names' frequencies, or the many rare names would dominate the loss at first
            self.names.bias.copy_(share.logit())

    def loss(self, hidden: torch.Tensor, rows: np.ndarray, in_order: bool = False) -> torch.Tensor:
        """The loss in nats per name in a caption: the mean state names them, or the last state if `in_order`."""
        state = hidden[:, -1] if in_order else hidden.mean(1)  # (B, D)
        said = self.named[rows]  # (B, names)
        return F.binary_cross_entropy_with_logits(self.names(state), said, reduction="sum") / said.sum().clamp(min=1)
