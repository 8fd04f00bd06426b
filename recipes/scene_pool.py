"""Training scenes for the tiny bases: rendered once, with their codes, conversations, and what stands in every cell."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from digits import COLOURS, DESCRIBE, QUESTION_KINDS, Scene, random_scene
from torch import nn
from tqdm.auto import tqdm

from uc_adapters.layers import raster_to_cells


class ScenePool:
    """Scenes rendered once, with the dense codes of each (set once the VQ tokenizer is trained)."""

    def __init__(self, size: int, rng: np.random.Generator, split: str = "train"):
        self.rng = rng
        self.scenes = [random_scene(rng, split) for _ in range(size)]
        self.pixels = torch.from_numpy(np.stack([scene.render(split) for scene in self.scenes]))  # (N, 64, 64, 3)
        self.codes = torch.empty(0)

    def draw(self, count: int) -> np.ndarray:
        """The rows of `count` scenes, at random."""
        return self.rng.integers(len(self.scenes), size=count)

    def pixel_values(self, rows: np.ndarray) -> torch.Tensor:
        """(B, 3, 64, 64) in [-1, 1], as the processor gives them."""
        return self.pixels[rows].permute(0, 3, 1, 2).float() / 127.5 - 1

    @torch.no_grad()
    def encode(self, latents: Callable[[torch.Tensor], torch.Tensor], codebook: torch.Tensor) -> None:
        """Sets the codes of all scenes; `latents` turns pixels into unit-norm latents (B, T, C)."""
        batches = np.array_split(np.arange(len(self.scenes)), math.ceil(len(self.scenes) / 64))
        codes = [nearest_codes(latents(self.pixel_values(rows)), codebook) for rows in tqdm(batches, desc="encode the pool")]
        self.codes = torch.cat(codes)  # (N, 64)

    def conversation(self, row: int, image: str) -> str:
        """Several questions about a scene and their answers, in the chat template's words, behind `image`'s."""
        scene = self.scenes[row]
        pairs = [scene.question(kind, self.rng) for kind in ("digit", *QUESTION_KINDS, "colour")]
        pairs = [pair for pair in pairs if pair] + [(DESCRIBE, scene.caption())]
        turns = [pairs[i] for i in self.rng.permutation(len(pairs))]
        text = "".join(f"<|User|>: {question}\n\n<|Assistant|>: {answer}<eos>" for question, answer in turns)
        return "<bos>" + text.replace("<|User|>: ", f"<|User|>: {image}", 1)

    def prompt(self, row: int, begin: str) -> str:
        """A request to draw a scene, in the chat template's words, up to the image's begin."""
        return f"<bos><|User|>: {self.scenes[row].shuffled_caption(self.rng)}\n\n<|Assistant|>:{begin}"

    def dropped(self, count: int, share: float = 0.1) -> torch.Tensor:
        """Which of `count` prompts lose their words, so that guidance has its unconditional model, (B,)."""
        return torch.from_numpy(self.rng.random(count) < share)


def answer_labels(ids: torch.Tensor, tokenizer) -> torch.Tensor:
    """The ids (B, L) at the answers alone, -100 elsewhere: from behind "<|Assistant|> :" through the answer's <eos>."""
    starts = ids == tokenizer.convert_tokens_to_ids("<|Assistant|>")
    started = starts.cumsum(1)
    ended = F.pad((ids == tokenizer.eos_token_id).cumsum(1), (1, -1))  # the eos itself still belongs to it
    prefix = starts | F.pad(starts, (1, -1))
    return ids.masked_fill(~((started > ended) & ~prefix), -100)


def nearest_codes(latents: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Indices of the nearest codes by cosine, (B, T)."""
    return (latents @ F.normalize(codebook, dim=-1).T).argmax(-1)


def by_cell(x: torch.Tensor) -> torch.Tensor:
    """Groups an 8 x 8 raster by the scene's four cells: (B, 64, ...) -> (B, 4, 16, ...)."""
    return raster_to_cells(x, 4, (8, 8))


def patch_labels(scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """What stands in the cell of each patch, (B, 4, 16): digits with 10 for empty, colours with 6 for empty."""
    names = list(COLOURS)
    digits = [[10 if cell is None else cell.digit for cell in scene.cells] for scene in scenes]
    colours = [[len(names) if cell is None else names.index(cell.colour) for cell in scene.cells] for scene in scenes]
    return tuple(torch.tensor(labels).unsqueeze(-1).expand(-1, -1, 16) for labels in (digits, colours))


class CellHead(nn.Module):
    """Names a cell's digit and colour from a hidden state; used in training, then dropped."""

    def __init__(self, width: int):
        super().__init__()
        self.digit, self.colour = nn.Linear(width, 11), nn.Linear(width, len(COLOURS) + 1)

    def loss(self, hidden: torch.Tensor, digits: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, 4, n, D) against the labels (B, 4, n) of `patch_labels`."""
        digit_loss = F.cross_entropy(self.digit(hidden).flatten(0, -2), digits.flatten())
        return digit_loss + F.cross_entropy(self.colour(hidden).flatten(0, -2), colours.flatten())
