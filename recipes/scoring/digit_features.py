"""Features of scenes of digits, for a Fréchet distance where no Inception can be downloaded.

A small network is trained here, within seconds, to name the digit and the colour of each quarter, on scenes of train scans.
The features are the inputs of its last layers.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from tiny_world.digits import COLOURS, IMAGE_SIZE, QUARTER_SIZE, random_scene
from tiny_world.scene_pool import patch_labels
from torch import nn

QUARTER_FEATURES = 16
_STEPS, _BATCH = 200, 64


class DigitFeatures(nn.Module):
    """Maps images (B, 3, 64, 64) uint8 to features (B, 64): 16 of each quarter, in raster order.

    With `num_features` it can be the `feature` of torchmetrics' `FrechetInceptionDistance`.

    Raises:
        ValueError: The images have another shape or dtype.
    """

    num_features = 4 * QUARTER_FEATURES

    def __init__(self):
        super().__init__()
        self.of_quarter = nn.Sequential(
            nn.Conv2d(3, 16, 4, stride=4),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=1, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, QUARTER_FEATURES),
            nn.BatchNorm1d(QUARTER_FEATURES, affine=False),  # unit variance: distances do not depend on a trained scale
        )
        self.digit, self.colour = (
            nn.Linear(QUARTER_FEATURES, 11),
            nn.Linear(QUARTER_FEATURES, len(COLOURS) + 1),
        )  # the last class is "empty"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.dtype != torch.uint8 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"images of {images.dtype} and shape {tuple(images.shape)}; expected uint8, (B, 3, 64, 64).")
        # (B, 3, 64, 64) -> (B * 4, 3, 32, 32)
        quarters = images.unfold(2, QUARTER_SIZE, QUARTER_SIZE).unfold(3, QUARTER_SIZE, QUARTER_SIZE).permute(0, 2, 3, 1, 4, 5)
        features = self.of_quarter(quarters.flatten(0, 2).float() / 127.5 - 1)  # (B * 4, 16)
        return features.unflatten(0, (-1, 4)).flatten(1)

    def names(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of each quarter's digit, (B, 4, 11), and colour, (B, 4, 7)."""
        features = self(images).unflatten(1, (4, QUARTER_FEATURES))
        return self.digit(features), self.colour(features)


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """Images (B, 64, 64, 3) uint8 in the order of torch, (B, 3, 64, 64)."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


@cache
@torch.enable_grad()  # the first caller may have gradients disabled
def digit_features() -> DigitFeatures:
    """Trains the extractor and freezes it. It is the same in every process, and leaves torch's random state unchanged."""
    rng = np.random.default_rng(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DigitFeatures()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=_STEPS)
    for _ in range(_STEPS):
        scenes = [random_scene(rng, "train") for _ in range(_BATCH)]
        named = model.names(to_tensor(np.stack([scene.render("train") for scene in scenes])))
        labels = (of_patch[..., 0] for of_patch in patch_labels(scenes))  # (B, 4)
        pairs = zip(named, labels, strict=True)
        loss = sum(F.cross_entropy(logits.flatten(0, 1), truth.flatten()) for logits, truth in pairs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)
