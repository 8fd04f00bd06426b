"""Stage 1: an adapter's tokenizer side learns by reconstruction, with the language model frozen (UniCompress, eq. 8).

- Generation: the extractor of global codes and the decompressor learn from the VQ tokenizer's latents. The loss is
  L = L_reg + codebook_weight * L_cb. L_cb is the cross-entropy of the true dense codes, and L_reg the squared distance between
  the expected codebook entry and the true one. Global tokens are quantised with a straight-through gradient. A commitment term
  keeps them near their codes, and a usage term (how much a code tells about its image, over the batch) prevents collapse.
- Understanding: the extractor of global tokens learns by regression of the dense features (of the vision tower, or the
  embeddings of the codes) from {G, X_cont}, with a readout that is discarded afterwards. A base that cannot generate images
  trains only this part.

With decompressor="strip", stage 1 trains nothing for generation, since the decompressor learns from the language model's hidden
states in stage 2.
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
from ..errors import InputError
from ..families import family_of_processor
from ..images import unpack_latents
from ..layers import Grid, average_pool, nearest_codes, straight_through, windows_to_raster
from ..layers.attention import Attention
from ..layers.positions import interpolate
from ..model import UniCompressModel
from .resumable import ResumableTrainer

ENOUGH_USAGE = 2.0  # nats; above it the usage term has no gradient, and only reconstruction counts


class FeatureReadout(nn.Module):
    """Restores dense features from {G, X_cont}, to train the reading extractor. It is discarded after training."""

    def __init__(self, width: int, side: int, stride: int):
        super().__init__()
        self.side, self.stride = side, stride
        self.positions = nn.Parameter(torch.randn(side**2, width) * 0.02)
        self.attention = Attention(width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, globals_: torch.Tensor, pooled: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Returns features (B, T, C) from G (B, N_g, C) and X_cont (B, T', C)."""
        spread = windows_to_raster(pooled.unsqueeze(2).expand(-1, -1, self.stride**2, -1), self.stride, grid)  # (B, T, C)
        x = self.norm(spread + interpolate(self.positions, self.side, grid))
        x = x + self.attention(x, self.attention.keys_values(globals_))
        return spread + self.mlp(x)


def scale_of(codebook: torch.Tensor) -> torch.Tensor:
    """Returns the mean squared length of the entries, the unit of squared distances. It is 1 on the unit sphere."""
    return codebook.square().sum(-1).mean()


def usage(globals_: torch.Tensor, codebook: torch.Tensor, temperature: float = 0.05) -> torch.Tensor:
    """Returns how much a global token's code tells about its image, in nats, as a mean over the tokens. 0 means collapse.

    It is the mutual information of code and image over the batch: the entropy of the mean assignment minus the mean entropy.
    The first term alone would also be large for one vague assignment that is the same for all images.
    """
    near = globals_ @ codebook.T - codebook.square().sum(-1) / 2  # (B, N_g, K)
    shares = (near / (temperature * scale_of(codebook))).softmax(-1)

    def entropy(p: torch.Tensor) -> torch.Tensor:
        return -(p * p.clamp(min=1e-9).log()).sum(-1)

    return (entropy(over_processes(shares.mean(0))) - entropy(shares).mean(0)).mean()


def over_processes(mean: torch.Tensor) -> torch.Tensor:
    """Averages a mean over the batches of all processes, so that two processes train as one does."""
    if not distributed.is_initialized():
        return mean
    return all_reduce(mean) / distributed.get_world_size()


class ReconstructionStage(nn.Module):
    """The parts of an adapter that stage 1 trains, with their losses. They are a separate module, so no checkpoint has the
    base.

    Args:
        model: The base with an adapter. The adapter's tokenizer side is trained in place, and the rest is frozen.
    """

    def __init__(self, model: UniCompressModel):
        super().__init__()
        model.train_only("tokenizer")
        self.unregistered = (model,)  # the tuple hides the base from PyTorch, so that it is neither saved nor trained
        config, geometry, reader = model.active_peft_config, model.family.geometry, model.read_layer.active_module()
        self.trained = nn.ModuleDict()
        if reader.extractor is not None:
            self.trained["read_extractor"] = reader.extractor
            self.trained["readout"] = FeatureReadout(geometry.read_width, geometry.read_side, config.read_stride())
        if model.code_head is not None:
            module = model.code_head.module
            if module.extractor is not None:
                self.trained["draw_extractor"] = module.extractor
            if "decompressor" in module.tokenizer_parts:
                self.trained["pool"] = module.pool  # the average has no weights, but the poolings of ablate.py have
                self.trained["decompressor"] = module.decompressor

    @property
    def model(self) -> UniCompressModel:
        """The base with the adapter."""
        return self.unregistered[0]

    def forward(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None, latents: list[torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Computes the loss and its parts.

        Args:
            pixel_values: Images, (N, 3, H, W).
            image_sizes: (N, 2), height and width in pixels, if images have any size.
            latents: The images' latents, N times (T, C). Default: they are computed.

        Returns:
            `loss`, and the parts of the loss by name.
        """
        parts: dict[str, torch.Tensor] = {}
        family = self.model.family
        for rows, pixels, size in family.by_size(pixel_values, image_sizes):
            share, losses = len(rows) / len(pixel_values), {}
            if "decompressor" in self.trained:
                size_latents = family.latents(pixels) if latents is None else torch.stack([latents[row] for row in rows])
                losses |= self.drawing_losses(size_latents, family.draw_grid(size))
            if "read_extractor" in self.trained:
                losses["reading_reconstruction"] = self.reading_loss(pixels, family.read_grid(size))
            for name, value in losses.items():
                parts[name] = parts.get(name, 0) + share * value
        weight = self.model.active_peft_config.codebook_weight
        weights = {"reconstruction": 1, "codebook": weight, "commitment": 0.25 * weight, "reading_reconstruction": 1}
        loss = sum(weights[name] * parts[name] for name in weights if name in parts)
        if "global_code_usage" in parts:
            loss = loss - 0.2 * weight * parts["global_code_usage"].clamp(max=ENOUGH_USAGE)
        return {"loss": loss, **parts}

    def drawing_losses(self, latents: torch.Tensor, grid: Grid) -> dict[str, torch.Tensor]:
        """Returns the losses of eq. 8 for the drawing side, from latents (B, T, C)."""
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
        """Returns teacher-forced logits of the dense codes, (B, T, K), from global tokens (B, N_g, C) and pooled latents."""
        head = self.model.code_head
        codebook = head.codebook
        g_hat = straight_through(globals_, codebook)
        x_deq = straight_through(head.module.pool(latents, grid), codebook)  # (B, T', C)
        entries = head.entries(nearest_codes(latents, codebook))  # (B, T, C)
        return head.family.code_logits(self.trained["decompressor"](entries, x_deq, g_hat, grid)).float()

    @torch.no_grad()
    def give_back(self, pixels: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Compresses images (B, 3, H, W) and expands them again; returns the most likely dense codes, (B, T)."""
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
        """Returns the squared error of the restored features relative to their variance. Predicting the mean would give 1."""
        with torch.no_grad():
            features = self.model.family.read_features(pixels).float()  # (B, T, read_width)
        pooled = average_pool(features, self.model.active_peft_config.read_stride(), grid)
        restored = self.trained["readout"](self.trained["read_extractor"](features, grid), pooled, grid)
        variance = over_processes(features.square().mean()) - over_processes(features.mean()).square()
        return (restored - features).square().mean() / variance

    @torch.no_grad()
    def least_perplexity(self, rows: Sequence[dict], collator: ImageCollator, images: int = 512) -> float:
        """Returns the perplexity of the codes of the least used global token, over images of the rows. 1 means collapse."""
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
    """Makes batches for `ReconstructionStage` from rows with `images`, and with `latents` if they are cached.

    Args:
        processor: The adapter's processor.
        code_width: C, the codebook's dimension.
    """

    processor: ProcessorMixin
    code_width: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        images = [image for row in rows for image in row["images"]]
        batch = family_of_processor(self.processor).image_inputs(self.processor, images)
        latents = [packed for row in rows for packed in row.get("latents") or [None]]
        if all(latents):  # images that are only read have no latents
            batch["latents"] = [unpack_latents(packed, self.code_width)[-1][1] for packed in latents]
        return batch | {"origins": [row["origin"] for row in rows if "origin" in row]}


class ReconstructionTrainer(ResumableTrainer, Trainer):
    """Trains a `ReconstructionStage` and logs the parts of its loss.

    Args:
        model: The stage to train.
        args: transformers' training arguments.
        processing_class: The adapter's processor.
        **kwargs: Passed to `Trainer`.

    Raises:
        InputError: The stage has nothing to train.
    """

    parts = ("reconstruction", "codebook", "code_accuracy", "commitment", "global_code_usage", "reading_reconstruction")

    def __init__(self, model: ReconstructionStage, args: TrainingArguments, *, processing_class: ProcessorMixin, **kwargs: Any):
        if not model.trained:
            raise InputError(
                'Stage 1 has nothing to train: the adapter has no global tokens, and "strip" learns in stage 2; expected '
                "global tokens, or another decompressor. Go on with stage 2."
            )
        collator = ImageCollator(processing_class, model.model.family.geometry.code_width)
        super().__init__(model, args, data_collator=collator, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses = model(**inputs)
        for part in self.parts:
            if part in losses:
                self.record(part, losses[part])
        return (losses["loss"], losses) if return_outputs else losses["loss"]
