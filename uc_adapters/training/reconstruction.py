"""Stage 1: an adapter's tokenizer side learns by reconstruction, while the language model is frozen (UniCompress, eq. 8).

- generation: the extractor of global codes and the decompressor, from the VQ tokenizer's latents,
  L = L_reg + codebook_weight * L_cb, with L_cb the cross-entropy of the true dense codes and L_reg the distance of the
  expected codebook entry to the true one. Global tokens pass the codebook straight through; a commitment term keeps
  them near their codes and a usage term (what a code tells of its image, over the batch) keeps them from collapsing.
- understanding: the extractor of global tokens, by regression of the dense features (of the vision tower, or the embeddings of
  the codes) from {G, X_cont} with a readout that is thrown away. A base that cannot generate images trains this alone.

With decompressor="strip" stage 1 trains nothing of generation: the decoder learns from the language model's hidden states, in
stage 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.distributed.nn.functional import all_reduce
from transformers import ProcessorMixin, Trainer, TrainingArguments

from ..code_head import CodeHead
from ..images import unpack_latents
from ..layers import Grid, average_pool, nearest_codes, straight_through, windows_to_raster
from ..layers.attention import Attention
from ..layers.positions import interpolate
from ..model import UniCompressModel
from .resumable import ResumableTrainer

ENOUGH_USAGE = 2.0  # nats: above it the guard against collapse rests, and reconstruction alone decides


class FeatureReadout(nn.Module):
    """Dense features back from {G, X_cont}: scaffolding for the reading extractor, thrown away."""

    def __init__(self, width: int, side: int, stride: int):
        super().__init__()
        self.side, self.stride = side, stride
        self.positions = nn.Parameter(torch.randn(side**2, width) * 0.02)
        self.attention = Attention(width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, globals_: torch.Tensor, pooled: torch.Tensor, grid: Grid) -> torch.Tensor:
        """G (B, N_g, C), X_cont (B, T', C) -> (B, T, C)."""
        spread = windows_to_raster(pooled.unsqueeze(2).expand(-1, -1, self.stride**2, -1), self.stride, grid)  # (B, T, C)
        x = self.norm(spread + interpolate(self.positions, self.side, grid))
        x = x + self.attention(x, self.attention.keys_values(globals_))
        return spread + self.mlp(x)


def scale_of(codebook: torch.Tensor) -> torch.Tensor:
    """Mean square length of the entries, by which squared distances are measured: 1 on the unit sphere."""
    return codebook.square().sum(-1).mean()


def usage(globals_: torch.Tensor, codebook: torch.Tensor, temperature: float = 0.05) -> torch.Tensor:
    """How much a global token's code tells of its image, in nats, mean over tokens: 0 is collapse.

    The mutual information of code and image over the batch: entropy of the mean assignment less mean entropy. The first
    term alone would be content with one vague assignment for all images.
    """
    near = globals_ @ codebook.T - codebook.square().sum(-1) / 2  # (B, N_g, K)
    shares = (near / (temperature * scale_of(codebook))).softmax(-1)

    def entropy(p: torch.Tensor) -> torch.Tensor:
        return -(p * p.clamp(min=1e-9).log()).sum(-1)

    return (entropy(over_processes(shares.mean(0))) - entropy(shares).mean(0)).mean()


def over_processes(mean: torch.Tensor) -> torch.Tensor:
    """A mean over the batch, as a mean over the batches of all processes: two must train as one does."""
    if not distributed.is_initialized():
        return mean
    return all_reduce(mean) / distributed.get_world_size()


class ReconstructionStage(nn.Module):
    """What stage 1 trains of an adapter, with its losses; in a module of its own, so that no checkpoint holds the base.

    Args:
        model: Its adapter's tokenizer side is trained in place; the rest is frozen.
    """

    def __init__(self, model: UniCompressModel):
        super().__init__()
        model.train_only("tokenizer")
        self.unregistered = (model,)  # in a tuple: the base is no part of what is saved and trained
        config, geometry, reader = model.active_peft_config, model.family.geometry, model.read_layer.active_module()
        self.trained = nn.ModuleDict()
        if reader.extractor is not None:
            self.trained["read_extractor"] = reader.extractor
            self.trained["readout"] = FeatureReadout(geometry.read_width, geometry.read_side, config.stride)
        if model.code_head is not None:
            module = model.code_head.module
            if module.extractor is not None:
                self.trained["draw_extractor"] = module.extractor
            if "decompressor" in module.tokenizer_parts:
                self.trained["pool"] = module.pool  # the average has no weights; ablate.py's have
                self.trained["decompressor"] = module.decompressor

    @property
    def model(self) -> UniCompressModel:
        """The base with the adapter."""
        return self.unregistered[0]

    def forward(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None, latents: list[torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Images (N, 3, H, W), where they are at hand with latents N times (T, C) -> the loss, and its parts."""
        parts: dict[str, torch.Tensor] = {}
        family = self.model.family
        for rows, pixels, size in family.by_size(pixel_values, image_sizes):
            share, of_size = len(rows) / len(pixel_values), {}
            if "decompressor" in self.trained:
                own = family.latents(pixels) if latents is None else torch.stack([latents[row] for row in rows])
                of_size |= self.drawing_losses(own, family.draw_grid(size))
            if "read_extractor" in self.trained:
                of_size["reading_reconstruction"] = self.reading_loss(pixels, family.read_grid(size))
            for name, value in of_size.items():
                parts[name] = parts.get(name, 0) + share * value
        weight = self.model.active_peft_config.codebook_weight
        weights = {"reconstruction": 1, "codebook": weight, "commitment": 0.25 * weight, "reading_reconstruction": 1}
        loss = sum(weights[name] * parts[name] for name in weights if name in parts)
        if "global_code_usage" in parts:
            loss = loss - 0.2 * weight * parts["global_code_usage"].clamp(max=ENOUGH_USAGE)
        return {"loss": loss, **parts}

    def drawing_losses(self, latents: torch.Tensor, grid: Grid) -> dict[str, torch.Tensor]:
        """Eq. 8 for the drawing side, from latents (B, T, C)."""
        head: CodeHead = self.model.code_head
        codebook = head.codebook
        scale = scale_of(codebook)
        dense = nearest_codes(latents, codebook)  # (B, T)
        globals_ = head.globals_of(latents, grid)  # (B, N_g, C)
        logits = self.reconstruct(latents, globals_, grid)  # (B, T, K)
        expected = logits.softmax(-1) @ codebook  # (B, T, C)
        losses = {
            "reconstruction": (expected - codebook[dense]).square().sum(-1).mean() / scale,
            "codebook": F.cross_entropy(logits.flatten(0, 1), dense.flatten()),
            "code_accuracy": (logits.argmax(-1) == dense).float().mean(),
        }
        if globals_.shape[1]:
            chosen = codebook[nearest_codes(globals_, codebook)]  # (B, N_g, C)
            losses["commitment"] = (globals_ - chosen).square().sum(-1).mean() / scale
            losses["global_code_usage"] = usage(globals_, codebook)
        return losses

    def reconstruct(self, latents: torch.Tensor, globals_: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Teacher-forced logits of the dense codes, (B, T, K), from global tokens (B, N_g, C) and pooled latents."""
        head = self.model.code_head
        codebook = head.codebook
        g_hat = straight_through(globals_, codebook)
        x_deq = straight_through(head.module.pool(latents, grid), codebook)  # (B, T', C)
        entries = head.entries(nearest_codes(latents, codebook))  # (B, T, C)
        return head.family.code_logits(self.trained["decompressor"](entries, x_deq, g_hat, grid)).float()

    @torch.no_grad()
    def give_back(self, pixels: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Images (B, 3, H, W) through their compact codes and the decompressor again: dense codes (B, T), the likeliest."""
        head = self.model.code_head
        codebook, latents = head.codebook, head.family.latents(pixels)
        pooled = head.module.pool(latents, grid)
        return self.trained["decompressor"].draw(
            head.codebook.to(head.dtype),
            head.entries(nearest_codes(pooled, codebook)),
            head.entries(nearest_codes(head.globals_of(latents, grid), codebook)),
            grid,
            lambda features: head.family.code_logits(features).argmax(-1),
        )

    def reading_loss(self, pixels: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Regression of the dense features, relative to their variance: 1 is what the mean would give."""
        with torch.no_grad():
            features = self.model.family.read_features(pixels).float()  # (B, T, read_width)
        pooled = average_pool(features, self.model.active_peft_config.stride, grid)
        restored = self.trained["readout"](self.trained["read_extractor"](features, grid), pooled, grid)
        variance = over_processes(features.square().mean()) - over_processes(features.mean()).square()
        return (restored - features).square().mean() / variance

    @torch.no_grad()
    def least_perplexity(self, rows: Sequence[dict], collator: ImageCollator, images: int = 512) -> float:
        """Of the codes of the least used global token, over images of the rows: 1 is collapse."""
        head, device = self.model.code_head, self.model.device
        codes = []
        for first in range(0, min(images, len(rows)), 32):
            batch = collator([rows[row] for row in range(first, min(first + 32, len(rows)))])
            pixel_values = batch["pixel_values"].to(device)
            by_size = head.family.by_size(pixel_values, batch.get("image_sizes"))
            codes += [head.compress(pixels).globals for _, pixels, _ in by_size]
        codes = torch.cat(codes)  # (N, N_g)
        counts = torch.stack([torch.bincount(codes[:, i], minlength=len(head.codebook)) for i in range(codes.shape[1])])
        shares = counts / len(codes)
        return (-(shares * shares.clamp(min=1e-9).log()).sum(-1)).exp().min().item()


@dataclass
class ImageCollator:
    """Makes a batch for `ReconstructionStage` of rows with `images`, and with `latents` where these are cached.

    Args:
        processor: The adapter's.
        code_width: C.
    """

    processor: ProcessorMixin
    code_width: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        images = [image for row in rows for image in row["images"]]
        prepared = self.processor.image_processor(images, return_tensors="pt")
        batch = {name: prepared[name] for name in ("pixel_values", "image_sizes") if name in prepared}
        latents = [packed for row in rows for packed in row.get("latents") or [None]]
        if all(latents):  # of what is only read, there are none
            batch["latents"] = [unpack_latents(packed, self.code_width) for packed in latents]
        return batch | {"origins": [row["origin"] for row in rows if "origin" in row]}


class ReconstructionTrainer(ResumableTrainer, Trainer):
    """Trains a `ReconstructionStage`; logs its parts."""

    parts = ("reconstruction", "codebook", "code_accuracy", "commitment", "global_code_usage", "reading_reconstruction")

    def __init__(self, model: ReconstructionStage, args: TrainingArguments, *, processing_class: ProcessorMixin, **kwargs: Any):
        collator = ImageCollator(processing_class, model.model.family.geometry.code_width)
        super().__init__(model, args, data_collator=collator, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses = model(**inputs)
        for part in self.parts:
            if part in losses:
                self.record(part, losses[part])
        return (losses["loss"], losses) if return_outputs else losses["loss"]
