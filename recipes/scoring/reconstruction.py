"""Pictures after a base's tokenizer alone: to codes (with an adapter: to compact codes and back), then to pixels."""

from __future__ import annotations

import torch
from PIL import Image
from scoring.contenders import Contender, grid_of
from scoring.stock_calls import base_of

from uc_adapters import UniCompressModel
from uc_adapters.families import family_of
from uc_adapters.pictures import to_pil


@torch.no_grad()
def restored(contender: Contender, images: list) -> list[Image.Image]:
    """A batch of images of one size, PIL's or (H, W, 3) uint8, as the tokenizer gives them back."""
    model = contender.model
    family, grid = family_of(base_of(model)), grid_of(contender)
    pixels = contender.processor.image_processor(images, return_tensors="pt")["pixel_values"].to(model.device)
    if isinstance(model, UniCompressModel):
        codes = model.code_head.compress(pixels)
        tokens = model.code_head.expand(codes.globals, codes.steps, grid, lambda logits: logits.argmax(-1))
    else:
        tokens = family.dense_codes(pixels)
    return to_pil(contender.processor, family.to_pixels(family.to_tokens(tokens, grid), grid))
