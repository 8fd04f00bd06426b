"""Pictures of a training: what the tokenizer side gives back of an image, and what the model draws for its caption."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
from PIL import Image
from stock_calls import calls_of, drawing_inputs, to_images
from transformers import ProcessorMixin, TrainerCallback

from uc_adapters import UniCompressModel
from uc_adapters.layers import Grid

mpl.use("Agg")
import matplotlib.pyplot as plt  # behind the choice of backend: no screen is needed

Rows = dict[str, list[Image.Image]]


class SamplePictures(TrainerCallback):
    """Writes a grid of pictures every N steps; the training goes on as if it had not."""

    def __init__(self, every: int, folder: Path, titles: list[str], rows: Callable[[], Rows]):
        """`rows` makes the pictures of each row of the grid by its name, a column for each of `titles`."""
        self.every, self.folder, self.titles, self.rows = every, folder, titles, rows

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every or not state.is_world_process_zero:
            return
        model.eval()  # the trainer's next step puts it back
        with torch.random.fork_rng(), torch.no_grad():  # a resumed run must see the same random numbers
            torch.manual_seed(0)
            rows = self.rows()
        self.folder.mkdir(parents=True, exist_ok=True)
        save_grid(rows, self.titles, self.folder / f"step-{state.global_step:06}.png")


def save_grid(rows: Rows, titles: list[str], path: Path) -> None:
    """A PNG with a row of pictures for each name, the titles above."""
    figure, axes = plt.subplots(
        len(rows), len(titles), figsize=(2.4 * len(titles), 2.6 * len(rows) + 0.6), squeeze=False, layout="constrained"
    )
    for (name, images), line in zip(rows.items(), axes, strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(textwrap.fill(title[:160], 28), fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def caption_of(row: dict) -> str:
    """The words of a row's first turn."""
    return " ".join(part["text"] for part in row["messages"][0]["content"] if part["type"] == "text")


def is_drawn(row: dict) -> bool:
    """Whether a row is a caption and the image to draw for it."""
    parts = [[part["type"] for part in turn["content"]] for turn in row["messages"]]
    return len(parts) == 2 and "image" not in parts[0] and parts[1] == ["image"]


def reconstructions(
    model: UniCompressModel,
    processor: ProcessorMixin,
    images: list[Image.Image],
    codes_of: Callable[[torch.Tensor, Grid], torch.Tensor],
) -> list[Image.Image]:
    """Images through the base's decoder again, from the dense codes (1, T) that `codes_of(pixels, grid)` gives."""
    family, calls, restored = model.family, calls_of(model), []
    for image in images:
        prepared = processor.image_processor([image], return_tensors="pt").to(model.device)
        [(_, pixels, size)] = family.by_size(prepared["pixel_values"], prepared.get("image_sizes"))
        grid = family.draw_grid(size)
        restored += to_images(processor, calls.pixels(model, family.to_tokens(codes_of(pixels, grid), grid), grid))
    return restored


def drawings(model: UniCompressModel, processor: ProcessorMixin, captions: list[str]) -> list[Image.Image]:
    """What the model draws for each caption."""
    calls, drawn = calls_of(model), []
    for caption in captions:
        inputs = drawing_inputs(processor, [caption], calls).to(model.device)
        tokens = calls.draw(model, inputs, do_sample=True)
        drawn += to_images(processor, calls.pixels(model, tokens, calls.grid(model, inputs)))
    return drawn
