"""Compares pictures with real ones, in features that were learned elsewhere: with the nearest, and with all together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scoring.picture_features import PictureFeatures, Seen

GIVEN_OTHERS = "_nearest_given_others"
FEW = 5  # of a label with more values, it is also told whether the right one is among the five nearest


class RealPictures:
    """Real pictures and their labels.

    Args:
        batches: The pictures, all of one size.
        labels: The values of each label, one a picture, by the label's name.
        network: What computes the features that are compared.
    """

    def __init__(self, batches: Iterable[list[Image.Image]], labels: dict[str, list[str]], network: PictureFeatures):
        self.network, self.labels = network, labels
        self.features = torch.cat([self.look(batch).features for batch in batches])  # (N, F)
        self._directions = F.normalize(self.features)
        self._codes = {label: torch.from_numpy(np.unique(values, return_inverse=True)[1]) for label, values in labels.items()}

    def look(self, images: list[Image.Image]) -> Seen:
        """What the network sees of a batch of images of one size."""
        return self.network.look(to_tensor(images).to(next(self.network.parameters()).device))

    def alike(self, features: torch.Tensor) -> torch.Tensor:
        """The cosine of features (B, F) and those of each real picture, (B, N)."""
        return F.normalize(features) @ self._directions.T

    def right(self, alike: torch.Tensor, owners: Sequence[int]) -> dict[str, np.ndarray]:
        """Whether the nearest real pictures have the labels that were asked for.

        Args:
            alike: `alike` of some pictures, (B, N).
            owners: For each, the real picture whose labels were asked for.

        Returns:
            A boolean array (B,) for each score. For each label: whether the nearest picture has it; if the label has many
            values, whether it is among the nearest five; and if there are other labels, whether the nearest of those pictures
            has it whose other labels are right.
        """
        right = {}
        for label, values in self.labels.items():
            ranks = self._ranks(label, alike, owners)
            right[f"{label}_nearest"] = ranks < 1
            if has_many(values):
                right[f"{label}_nearest_{FEW}"] = ranks < FEW
            if others := [other for other in self.labels if other != label]:
                right[f"{label}{GIVEN_OTHERS}"] = self._ranks(label, alike, owners, others) < 1
        return right

    def _ranks(self, label: str, alike: torch.Tensor, owners: Sequence[int], given: Sequence[str] = ()) -> np.ndarray:
        """How many other values of a label have a picture nearer than any with the right value, (B,).

        Only those real pictures count that have the right values of the labels `given`.
        """
        for other in given:
            codes = self._codes[other].to(alike.device)
            alike = alike.masked_fill(codes != codes[list(owners), None], -torch.inf)
        codes = self._codes[label].to(alike.device)
        nearest = torch.full((len(alike), int(codes.max()) + 1), -torch.inf, device=alike.device)
        nearest = nearest.scatter_reduce(1, codes.expand(len(alike), -1), alike, "amax")  # (B, V)
        return (nearest > nearest.gather(1, codes[list(owners), None])).sum(1).cpu().numpy()


def has_many(values: list[str]) -> bool:
    """Whether a label has so many values that a near miss says something."""
    return len(set(values)) > FEW


def frechet_distance(real: torch.Tensor, drawn: torch.Tensor) -> float:
    """The Fréchet distance of two sets of at least two features, (N, F) and (M, F), as normal distributions.

    The trace of the root of the covariances' product is the sum of the singular values of the product of their factors. So it
    needs no root of a matrix, which is inexact where there are fewer pictures than features.
    """
    real, drawn = real.double(), drawn.double()
    one, other = (
        torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r").R for x in (real, drawn)
    )  # covariance: R^T R
    apart = (real.mean(0) - drawn.mean(0)).square().sum()
    return (apart + one.square().sum() + other.square().sum() - 2 * torch.linalg.svdvals(one @ other.T).sum()).item()


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """Images of one size as a tensor, (B, 3, H, W) uint8."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
