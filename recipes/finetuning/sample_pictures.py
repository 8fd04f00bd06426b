"""Pictures during training: images after a round trip through the tokenizer side, and drawings for their captions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from reporting.pictures import Rows, save_grid
from scoring.stock_calls import calls_of, drawing_inputs
from transformers import ProcessorMixin, TrainerCallback

from uc_adapters import UniCompressModel
from uc_adapters.layers import Grid
from uc_adapters.pictures import to_pil


class SamplePictures(TrainerCallback):
    """Writes a grid of pictures every N steps, without an effect on the training."""

    def __init__(self, every: int, folder: Path, titles: list[str], rows: Callable[[], Rows]):
        """`rows` makes the grid: the pictures of each row by the row's name, one for each of `titles`."""
        self.every, self.folder, self.titles, self.rows = every, folder, titles, rows

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every or not state.is_world_process_zero:
            return
        model.eval()  # the trainer's next step switches it back to training
        with torch.random.fork_rng(), torch.no_grad():  # a resumed run must see the same random numbers
            torch.manual_seed(0)
            rows = self.rows()
        self.folder.mkdir(parents=True, exist_ok=True)
        save_grid(rows, self.titles, self.folder / f"step-{state.global_step:06}.png")


def reconstructions(
    model: UniCompressModel,
    processor: ProcessorMixin,
    images: list[Image.Image],
    codes_of: Callable[[torch.Tensor, Grid], torch.Tensor],
) -> list[Image.Image]:
    """Decodes images with the base's own decoder, from the dense codes (1, T) that `codes_of(pixels, grid)` returns."""
    family, restored = model.family, []
    for image in images:
        prepared = processor.image_processor([image], return_tensors="pt").to(model.device)
        [(_, pixels, size)] = family.by_size(prepared["pixel_values"], prepared.get("image_sizes"))
        grid = family.draw_grid(size)
        restored += to_pil(processor, family.to_pixels(family.to_tokens(codes_of(pixels, grid), grid), grid))
    return restored


def drawings(model: UniCompressModel, processor: ProcessorMixin, captions: list[str]) -> list[Image.Image]:
    """Draws an image for each caption."""
    calls, drawn = calls_of(model), []
    for caption in captions:
        inputs = drawing_inputs(processor, [caption], calls).to(model.device)
        tokens = calls.draw(model, inputs, do_sample=True)
        drawn += to_pil(processor, model.family.to_pixels(tokens, calls.grid(model, inputs)))
    return drawn
