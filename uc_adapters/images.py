"""The images of a batch, as pixels or as the VQ tokenizer's latents. Latents can be computed once and stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from transformers import ProcessorMixin

from .errors import InputError
from .families import Family, Size

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class Images:
    """Images to read or to draw, in the order of their placeholders.

    Attributes:
        pixel_values: (N, 3, H, W), padded to one size if images have any size.
        image_sizes: (N, 2), height and width in pixels, if images have any size.
        latents: (N, T, C), in place of the pixels of images to draw; padded to one length if images have any size.
    """

    pixel_values: torch.Tensor | None = None
    image_sizes: torch.Tensor | None = None
    latents: torch.Tensor | None = None

    @property
    def values(self) -> torch.Tensor | None:
        """The latents, or else the pixels; None if there are no images."""
        return self.pixel_values if self.latents is None else self.latents

    def sizes(self, family: Family) -> list[Size]:
        """Returns height and width of each image in pixels."""
        return [] if self.values is None else family.sizes(self.values, self.image_sizes)

    def longest(self, family: Family) -> int:
        """Returns the number of codes of the largest image to draw. Tensors with one entry per code are padded to it."""
        return max((rows * columns for rows, columns in map(family.draw_grid, self.sizes(family))), default=0)

    def check(self, family: Family) -> None:
        """Raises InputError if there are both pixels and latents, or if either has a wrong shape."""
        if self.latents is None:
            if self.pixel_values is not None:
                family.check_pixels(self.pixel_values, self.image_sizes)
            return
        if self.pixel_values is not None:
            raise InputError("gen_pixel_values and gen_latents at once; expected one of them, since they are the same images.")
        family.check_sizes(len(self.latents), self.image_sizes)
        shape, code_width = tuple(self.latents.shape), family.geometry.code_width
        longest = self.longest(family)
        if len(shape) != 3 or shape[1:] != (longest, code_width):
            raise InputError(
                f"gen_latents of shape {shape}; expected (images, {longest}, {code_width}). Compute latents "
                "with uc_adapters.images.pack_latents and the adapter's processor."
            )


def pack_latents(family: Family, processor: ProcessorMixin, images: list[Image]) -> list[dict]:
    """Computes the VQ tokenizer's latents of images, for a dataset column `latents` that `UniCompressCollator` unpacks.

    Args:
        family: The family of the base.
        processor: The adapter's processor.
        images: RGB images.

    Returns:
        For each image, `{"size": [H, W], "values": ...}`: the size in pixels after the processor, and the latents (T, C) as
        float32 bytes. If the base draws previews, the preview's size and latents come before those of the image.
    """
    packed = [{"size": [], "values": b""} for _ in images]
    for prepared in (family.preview_inputs(processor, images), family.image_inputs(processor, images)):
        if prepared is None:
            continue
        pixel_values = prepared["pixel_values"].to(family.device)
        for rows, pixels, size in family.by_size(pixel_values, prepared.get("image_sizes")):
            for row, latents in zip(rows, family.latents(pixels).cpu().numpy(), strict=True):  # (T, C), float32
                packed[row] = {"size": [*packed[row]["size"], *size], "values": packed[row]["values"] + latents.tobytes()}
    return packed


def unpack_latents(packed: dict, code_width: int) -> list[tuple[Size, torch.Tensor]]:
    """Returns size and latents (T, C) of one image that `pack_latents` packed, after those of its preview if it has one."""
    # `bytearray` copies: torch wants writable memory, and bytes are read-only
    latents = torch.frombuffer(bytearray(packed["values"]), dtype=torch.float32).view(-1, code_width)
    sizes = list(zip(packed["size"][::2], packed["size"][1::2], strict=True))
    areas = [height * width for height, width in sizes]
    counts = [len(latents) * area // sum(areas) for area in areas]  # every code has as many pixels
    return list(zip(sizes, latents.split(counts), strict=True))


def in_order(parts: list[dict[str, torch.Tensor]], order: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Joins prepared images of several sizes, padded to one size.

    Args:
        parts: The images of each part, `pixel_values` (n, 3, H, W), and `image_sizes` (n, 2) if images have any size.
        order: Of each image, the index of its part and its index in this part.
    """
    height, width = (max(part["pixel_values"].shape[side] for part in parts) for side in (2, 3))
    padded = [
        F.pad(part["pixel_values"], (0, width - part["pixel_values"].shape[3], 0, height - part["pixel_values"].shape[2]))
        for part in parts
    ]
    joined = {"pixel_values": torch.stack([padded[part][index] for part, index in order])}
    if "image_sizes" in parts[0]:
        joined["image_sizes"] = torch.stack([torch.as_tensor(parts[part]["image_sizes"][index]) for part, index in order])
    return joined
