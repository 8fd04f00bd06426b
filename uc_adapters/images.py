"""Images of a batch, as pixels or as the VQ tokenizer's latents of them, which can be computed once and kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import ProcessorMixin

from .errors import InputError
from .families import Family, Size

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class Images:
    """Images to read or to draw, in the order of their placeholders.

    Attributes:
        pixel_values: (N, 3, H, W), padded to one size where images have any size.
        image_sizes: (N, 2), height and width in pixels, where images have any size.
        latents: (N, T, C), in place of pixels to draw; padded likewise.
    """

    pixel_values: torch.Tensor | None = None
    image_sizes: torch.Tensor | None = None
    latents: torch.Tensor | None = None

    @property
    def values(self) -> torch.Tensor | None:
        """What there is of them; None where there are no images."""
        return self.pixel_values if self.latents is None else self.latents

    def sizes(self, family: Family) -> list[Size]:
        """Height and width of each in pixels."""
        return [] if self.values is None else family.sizes(self.values, self.image_sizes)

    def longest(self, family: Family) -> int:
        """Codes of the largest of them, where they are to draw; what goes by code is padded to it."""
        return max((rows * columns for rows, columns in map(family.draw_grid, self.sizes(family))), default=0)

    def check(self, family: Family) -> None:
        """Raises InputError where there are both pixels and latents, or either is of a wrong shape."""
        if self.latents is None:
            if self.pixel_values is not None:
                family.check_pixels(self.pixel_values, self.image_sizes)
            return
        if self.pixel_values is not None:
            raise InputError("gen_pixel_values and gen_latents at once; expected one of them: they are the same images.")
        family.check_sizes(len(self.latents), self.image_sizes)
        shape, code_width = tuple(self.latents.shape), family.geometry.code_width
        longest = self.longest(family)
        if len(shape) != 3 or shape[1:] != (longest, code_width):
            raise InputError(
                f"gen_latents of shape {shape}; expected (images, {longest}, {code_width}), as "
                "uc_adapters.images.pack_latents makes them of the processor's pixels."
            )


def pack_latents(family: Family, processor: ProcessorMixin, images: list[Image]) -> list[dict]:
    """What a VQ tokenizer says of images, for a column `latents` of a dataset: computed once, `UniCompressCollator` unpacks it.

    Args:
        family: Of the base.
        processor: The adapter's.
        images: RGB.

    Returns:
        Of each, {"size": [H, W] in pixels as the processor prepares it, "values": float32 bytes of the latents (T, C)}.
    """
    prepared = processor.image_processor(images, return_tensors="pt")
    pixel_values = prepared["pixel_values"].to(family.device)
    packed = {}
    for rows, pixels, size in family.by_size(pixel_values, prepared.get("image_sizes")):
        latents = family.latents(pixels).cpu().numpy()  # (n, T, C), float32
        packed.update({row: {"size": list(size), "values": own.tobytes()} for row, own in zip(rows, latents, strict=True)})
    return [packed[row] for row in range(len(images))]


def unpack_latents(packed: dict, code_width: int) -> torch.Tensor:
    """The latents (T, C) of one image of `pack_latents`."""
    return torch.frombuffer(bytearray(packed["values"]), dtype=torch.float32).view(
        -1, code_width
    )  # a copy: bytes are read-only
