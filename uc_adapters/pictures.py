"""Drawn pixels as PIL images, and picture files as the base can read them."""

from __future__ import annotations

from os import PathLike

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from transformers import ProcessorMixin

from .errors import InputError

MAX_PIXELS = 50_000_000  # of a file to read: more takes gigabytes, and the processor shrinks it at once


def to_pil(processor: ProcessorMixin, pixels: torch.Tensor) -> list[Image.Image]:
    """Makes PIL images of decoded pixels.

    Args:
        processor: The adapter's or the base's; it has an image processor with torchvision or with PIL.
        pixels: The pixels before postprocessing, (B, 3, H, W).
    """
    drawn = processor.postprocess(list(pixels.float().cpu()))["pixel_values"]
    if isinstance(drawn[0], Image.Image):
        return drawn
    return [Image.fromarray(np.asarray(image).transpose(1, 2, 0)) for image in drawn]  # (3, H, W); a tensor with torchvision


def open_picture(path: str | PathLike) -> Image.Image:
    """Opens a picture file as RGB, on white where it is transparent.

    Raises:
        InputError: The file is missing, is not a picture, is cut off, or has more than `MAX_PIXELS` pixels.
    """
    try:
        image = Image.open(path)
        if image.width * image.height > MAX_PIXELS:
            raise InputError(
                f"{path} has {image.width} x {image.height} pixels; expected at most {MAX_PIXELS:,} in all. Make it smaller."
            )
        image = image.convert("RGBA")
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} is too large: {error} Make it smaller.") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not a picture that PIL can read; expected PNG, JPEG, WebP, ...") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read as a picture: {error}.") from error
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
