"""The parts of pretraining that are specific to Apertus 1.5: it only reads, and its VQ tokenizer has no decoder."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from tiny_world.emu3_pretraining import SIDE, Emu3Pretraining
from tiny_world.scene_pool import ImagePool
from torch import nn
from transformers import Apertus1p5ForConditionalGeneration, Apertus1p5Processor

from uc_adapters.families import family_of


class Apertus1p5Pretraining(Emu3Pretraining):
    """The interface of a tiny Apertus 1.5 to `pretrain_tiny.py`. Reading is learned as Emu3 learns it, from codes."""

    draws = False

    def __init__(self, model: Apertus1p5ForConditionalGeneration, processor: Apertus1p5Processor, pool: ImagePool):
        self.model, self.processor, self.pool = model, processor, pool
        self.vqmodel = model.model.vision_tokenizer
        self.words = family_of(model).code_token_ids  # code -> token id
        width, factor = self.vqmodel.config.embed_dim, self.vqmodel.config.spatial_scale_factor
        self.block = processor.replace_image_token({"image_sizes": [[SIDE * factor] * 2]}, 0)
        # Trained with the VQ tokenizer, then dropped: the codes must keep what an image shows
        self.decoder = nn.Sequential(
            nn.Conv2d(width, 256, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(256, 3 * factor**2, 1),
            nn.PixelShuffle(factor),  # (B, 3 * f^2, 8, 8) -> (B, 3, 8 * f, 8 * f)
        )

    def vq_parameters(self) -> list[nn.Parameter]:
        return [*super().vq_parameters(), *self.decoder.parameters()]

    def latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, 64, 64) -> latents on the unit sphere, (B, T, 8)."""
        latents = self.vqmodel.quant_conv(self.vqmodel.encoder(pixel_values))  # (B, 8, 8, 8)
        return F.normalize(latents.flatten(2).transpose(1, 2), dim=-1)

    def restore(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, T, 8) -> pixels (B, 3, 64, 64)."""
        return self.decoder(latents.transpose(1, 2).unflatten(2, (SIDE, SIDE)))

    def _batch(self, texts: list[str], rows: np.ndarray, side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids (B, L) with the images' tokens at the placeholders, attention mask, and a mask of the codes."""
        tokenizer = self.processor.tokenizer
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side=side, add_special_tokens=False)
        image = batch["input_ids"] == self.processor.image_token_id
        ids = batch["input_ids"].masked_scatter(image, self.words[self.pool.codes[rows]])
        return ids, batch["attention_mask"], image
