"""Compares pictures with real ones, in features that were learned elsewhere: with the nearest, and with all together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scoring.picture_features import PictureFeatures, Seen
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance


class RealPictures:
    """Real pictures and their labels.

    Args:
        batches: The pictures, all of one size.
        labels: The values of each label, one a picture, by the label's name.
        network: What computes the features that are compared.
    """

    def __init__(self, batches: Iterable[list[Image.Image]], labels: dict[str, list[str]], network: PictureFeatures):
        self.network = network
        self.features = torch.cat([self.look(batch).features for batch in batches])  # (N, F)
        self.values, self._codes = {}, {}
        for label, of_pictures in labels.items():
            values, codes = np.unique(of_pictures, return_inverse=True)
            self.values[label] = values.tolist()
            self._codes[label] = torch.from_numpy(codes)

    def look(self, images: list[Image.Image]) -> Seen:
        """What the network sees of a batch of images of one size, on the CPU."""
        return self.network.look(to_tensor(images).to(next(self.network.parameters()).device)).cpu()

    def alike(self, features: torch.Tensor) -> torch.Tensor:
        """The cosine of features (B, F) and those of each real picture, (B, N)."""
        return F.normalize(features) @ F.normalize(self.features).T

    def ranks(self, label: str, alike: torch.Tensor, own: Sequence[int]) -> torch.Tensor:
        """How many other values of a label have a picture nearer than any with the right value, (B,); 0 is best.

        Args:
            label: The name of the label.
            alike: `alike` of the images, (B, N).
            own: For each image, the real picture whose value is the right one.
        """
        codes = self._codes[label]
        nearest = torch.full((len(alike), len(self.values[label])), -torch.inf)
        nearest = nearest.scatter_reduce(1, codes.expand(len(alike), -1), alike, "amax")  # (B, V)
        return (nearest > nearest.gather(1, codes[list(own), None])).sum(1)


class _Given(nn.Module):
    """Takes features for pictures, so that torchmetrics compares what is already computed."""

    num_features = PictureFeatures.num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def frechet_distance(real: torch.Tensor, drawn: torch.Tensor) -> float:
    """The Fréchet distance of two sets of at least two features, (N, F) and (M, F)."""
    metric = FrechetInceptionDistance(_Given())
    metric.update(real, real=True)
    metric.update(drawn, real=False)
    return metric.compute().item()


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """Images of one size as a tensor, (B, 3, H, W) uint8."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
