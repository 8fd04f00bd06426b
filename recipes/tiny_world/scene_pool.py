"""The training pools of the tiny bases: images with their codes, and digit scenes, whose quarters are known."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from tiny_world.digits import COLOURS, DESCRIBE, QUESTION_KINDS, Scene, random_scene
from torch import nn
from tqdm.auto import tqdm

from uc_adapters.layers import raster_to_windows


class ImagePool(ABC):
    """Images (N, 64, 64, 3) uint8, and their dense codes, which `encode` sets once the VQ tokenizer is trained."""

    def __init__(self, pixels: np.ndarray, rng: np.random.Generator):
        self.pixels, self.rng = torch.from_numpy(pixels), rng
        self.codes = torch.empty(0)
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> None:
        """Moves the images to a device, where `pixel_values` and `codes` are made."""
        self.device, self.pixels, self.codes = device, self.pixels.to(device), self.codes.to(device)

    @abstractmethod
    def conversation(self, row: int, image: str) -> str:
        """Questions about an image and their answers, in the chat template's form, after the tokens of `image`."""

    @abstractmethod
    def caption(self, row: int) -> str:
        """A prompt to draw the image of a row."""

    @abstractmethod
    def head(self, width: int) -> NamingHead:
        """A new head that names an image's content from hidden states of `width`."""

    def restoration_loss(self, restored: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """The loss of a VQ tokenizer's reconstruction of pixels (B, 3, 64, 64)."""
        error = restored - pixels
        return error.square().mean() + 0.3 * error.abs().mean()

    def draw(self, count: int) -> np.ndarray:
        """The indices of `count` random rows."""
        return self.rng.integers(len(self.pixels), size=count)

    def pixel_values(self, rows: np.ndarray) -> torch.Tensor:
        """The pixels of rows as the processor gives them, (B, 3, 64, 64) in [-1, 1]."""
        return self.pixels[rows].permute(0, 3, 1, 2).float() / 127.5 - 1

    def seen(self, rows: np.ndarray) -> torch.Tensor:
        """The pixels of rows as training reads them, (B, 3, 64, 64)."""
        return self.pixel_values(rows)

    @torch.no_grad()
    def encode(self, latents: Callable[[torch.Tensor], torch.Tensor], codebook: torch.Tensor) -> None:
        """Sets the codes of all images; `latents` turns pixels into unit-norm latents (B, T, C)."""
        batches = np.array_split(np.arange(len(self.pixels)), math.ceil(len(self.pixels) / 64))
        codes = [nearest_codes(latents(self.pixel_values(rows)), codebook) for rows in tqdm(batches, desc="encode the pool")]
        self.codes = torch.cat(codes)  # (N, 64)

    def prompt(self, row: int, begin: str) -> str:
        """A request to draw an image, in the chat template's form, up to the BOI token `begin`."""
        return f"<bos><|User|>: {self.caption(row)}\n\n<|Assistant|>:{begin}"

    def dropped(self, count: int, share: float = 0.1) -> np.ndarray:
        """Which of `count` prompts are dropped, so that guidance has an unconditional model, (B,) bool."""
        return self.rng.random(count) < share


class NamingHead(nn.Module, ABC):
    """Names what an image shows, from hidden states. It is used in training, then dropped."""

    @abstractmethod
    def loss(self, hidden: torch.Tensor, rows: np.ndarray, in_order: bool = False) -> torch.Tensor:
        """The loss of naming what the images at `rows` show, from hidden states (B, 64, D).

        With `in_order` the states have read the image code by code, so that only later ones can know it.
        """

    def report(self, tower: nn.Module) -> dict[str, float]:
        """How well a vision tower that was trained with this head names images that it never saw."""
        return {}


class ScenePool(ImagePool):
    """Scenes of handwritten digits, rendered once."""

    def __init__(self, size: int, rng: np.random.Generator, split: str = "train"):
        self.scenes = [random_scene(rng, split) for _ in range(size)]
        super().__init__(np.stack([scene.render(split) for scene in self.scenes]), rng)

    def conversation(self, row: int, image: str) -> str:
        """Several questions about a scene with their answers, in random order."""
        scene = self.scenes[row]
        pairs = [scene.question(kind, self.rng) for kind in ("digit", *QUESTION_KINDS, "colour")]
        pairs = [pair for pair in pairs if pair] + [(DESCRIBE, scene.caption())]
        turns = [pairs[i] for i in self.rng.permutation(len(pairs))]
        text = "".join(f"<|User|>: {question}\n\n<|Assistant|>: {answer}<eos>" for question, answer in turns)
        return "<bos>" + text.replace("<|User|>: ", f"<|User|>: {image}", 1)

    def caption(self, row: int) -> str:
        """The scene's caption, with its quarters in random order."""
        return self.scenes[row].shuffled_caption(self.rng)

    def head(self, width: int) -> QuarterHead:
        return QuarterHead(width, self.scenes)


def answer_labels(ids: torch.Tensor, tokenizer) -> torch.Tensor:
    """Labels: the ids (B, L) from after "<|Assistant|> :" through the answer's <eos>, and -100 elsewhere."""
    starts = ids == tokenizer.convert_tokens_to_ids("<|Assistant|>")
    started = starts.cumsum(1)
    ended = F.pad((ids == tokenizer.eos_token_id).cumsum(1), (1, -1))  # the answer includes its eos
    prefix = starts | F.pad(starts, (1, -1))
    return ids.masked_fill(~((started > ended) & ~prefix), -100)


def nearest_codes(latents: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Indices of the nearest codes by cosine, (B, T)."""
    return (latents @ F.normalize(codebook, dim=-1).T).argmax(-1)


def by_quarter(x: torch.Tensor) -> torch.Tensor:
    """Groups an 8 x 8 raster by the scene's four quarters: (B, 64, ...) -> (B, 4, 16, ...)."""
    return raster_to_windows(x, 4, (8, 8))


def patch_labels(scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels of each patch's quarter, (B, 4, 16): its digit, 10 if empty, and its colour, 6 if empty."""
    names = list(COLOURS)
    digits = [[10 if quarter is None else quarter.digit for quarter in scene.quarters] for scene in scenes]
    colours = [
        [len(names) if quarter is None else names.index(quarter.colour) for quarter in scene.quarters] for scene in scenes
    ]
    return tuple(torch.tensor(labels).unsqueeze(-1).expand(-1, -1, 16) for labels in (digits, colours))


class QuarterHead(NamingHead):
    """Names the digit and the colour of the quarter to which a hidden state belongs."""

    def __init__(self, width: int, scenes: list[Scene]):
        super().__init__()
        self.scenes = scenes
        self.digit, self.colour = nn.Linear(width, 11), nn.Linear(width, len(COLOURS) + 1)

    def loss(self, hidden: torch.Tensor, rows: np.ndarray, in_order: bool = False) -> torch.Tensor:
        """Cross-entropy of digits and colours. With `in_order`, only the last state of a quarter has read all of it."""
        hidden = by_quarter(hidden)  # (B, 4, 16, D)
        digits, colours = patch_labels([self.scenes[row] for row in rows])  # (B, 4, 16)
        if in_order:
            hidden, digits, colours = hidden[:, :, -1:], digits[:, :, -1:], colours[:, :, -1:]
        digit_loss = F.cross_entropy(self.digit(hidden).flatten(0, -2), digits.flatten())
        return digit_loss + F.cross_entropy(self.colour(hidden).flatten(0, -2), colours.flatten())

    def report(self, tower: nn.Module) -> dict[str, float]:
        held = ScenePool(500, np.random.default_rng(1), "held-out")
        digits, _ = patch_labels(held.scenes)
        named = self.digit(by_quarter(tower(held.pixel_values(np.arange(500))).last_hidden_state)).argmax(-1)
        return {"held_out_digits": round((named == digits)[digits < 10].float().mean().item(), 4)}
