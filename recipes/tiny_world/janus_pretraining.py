"""The parts of pretraining that are specific to Janus: shapes of the VQ tokenizer, the vision tower, the two losses."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from tiny_world.scene_pool import ImagePool, NamingHead, answer_labels
from torch import nn
from transformers import JanusForConditionalGeneration, JanusProcessor


class JanusPretraining:
    """The interface of a tiny Janus to `pretrain_tiny.py`."""

    has_vision_tower, draws = True, True

    def __init__(self, model: JanusForConditionalGeneration, processor: JanusProcessor, pool: ImagePool):
        self.model, self.processor, self.pool = model, processor, pool
        self.vqmodel = model.model.vqmodel

    def vq_parameters(self) -> list[nn.Parameter]:
        """The parameters that the tokenizer's stage trains. The codebook is not trained by gradients."""
        return [p for name, p in self.vqmodel.named_parameters() if not name.startswith("quantize")]

    def latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, 64, 64) -> latents on the unit sphere, (B, T, 8). T is the square of the grid's side."""
        latents = self.vqmodel.quant_conv(self.vqmodel.encoder(pixel_values))  # (B, 8, side, side)
        return F.normalize(latents.flatten(2).transpose(1, 2), dim=-1)

    def restore(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, T, 8) -> pixels (B, 3, 64, 64)."""
        side = math.isqrt(latents.shape[1])
        grid = latents.transpose(1, 2).unflatten(2, (side, side))  # (B, 8, side, side)
        return self.vqmodel.decoder(self.vqmodel.post_quant_conv(grid))

    def joint_parameters(self) -> list[nn.Parameter]:
        """The parameters that the joint stage trains: all but VQ tokenizer and vision tower (CHANGELOG: what went wrong)."""
        with torch.no_grad():  # the embeddings of generated codes start as the codebook
            codebook = F.normalize(self.vqmodel.quantize.embedding.weight, dim=-1)
            self.model.model.generation_embeddings.weight.copy_(codebook)
        self.model.model.vision_model.requires_grad_(False)
        frozen = (".vqmodel.", ".vision_model.")
        return [p for name, p in self.model.named_parameters() if not any(part in name for part in frozen)]

    def reading_loss(self, rows: np.ndarray, head: NamingHead) -> torch.Tensor:
        """Cross-entropy of the answers."""
        tokenizer = self.processor.tokenizer
        texts = [self.pool.conversation(row, self.processor.replace_image_token({}, 0)) for row in rows]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False).to(
            self.model.device
        )
        labels = answer_labels(batch["input_ids"], tokenizer)
        return self.model(**batch, labels=labels, pixel_values=self.pool.seen(rows)).loss

    def drawing_losses(self, rows: np.ndarray, head: NamingHead) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of the dense codes, and the binding loss: the hidden states name what they are to draw."""
        tokenizer, model = self.processor.tokenizer, self.model
        texts = [self.pool.prompt(row, self.processor.image_start_token) for row in rows]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False).to(
            model.device
        )
        ids, dropped = batch["input_ids"], self.pool.dropped(len(rows))
        kept = (ids == tokenizer.bos_token_id) | (torch.arange(ids.shape[1], device=ids.device) == ids.shape[1] - 1)
        ids = ids.masked_fill(torch.from_numpy(dropped).to(ids.device)[:, None] & ~kept, tokenizer.pad_token_id)
        codes = self.pool.codes[rows]  # (B, T)
        prompt = model.get_input_embeddings()(ids)  # (B, P, D)
        drawn = model.prepare_embeddings_for_image_generation(codes[:, :-1])  # (B, T - 1, D)
        hidden = model.model.language_model(
            inputs_embeds=torch.cat([prompt, drawn], 1),
            attention_mask=F.pad(batch["attention_mask"], (0, drawn.shape[1]), value=1),
            use_cache=False,
        ).last_hidden_state[:, prompt.shape[1] - 1 :]  # (B, T, D)
        code_loss = F.cross_entropy(model.model.generation_head(hidden).flatten(0, 1), codes.flatten())
        told = np.flatnonzero(~dropped)  # known on the CPU, so that it need not wait for a GPU
        return code_loss, head.loss(hidden[told], rows[told])
