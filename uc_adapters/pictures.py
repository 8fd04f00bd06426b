"""Picture files as the models read them, and drawn pixels as PIL images."""

from __future__ import annotations

import warnings
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import ProcessorMixin

from .errors import InputError

MEGAPIXELS = 50  # a phone's largest photo; one as large takes 150 MB of memory


def open_picture(path: str | PathLike) -> Image.Image:
    """Reads a picture file: upright, RGB, white where it is transparent.

    Raises:
        InputError: The file is missing, is not a picture, is damaged, or has more than 50 megapixels. Such a picture is not
            decoded.
    """
    name = Path(path).name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the check below is stricter
            image = Image.open(path)
        with image:
            if (megapixels := image.width * image.height / 1e6) > MEGAPIXELS:
                raise _too_large(name, f"{megapixels:.0f}")
            return to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        raise _too_large(name, f"more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f}") from None
    except UnidentifiedImageError:
        raise InputError(f"{name} is no picture that can be read; expected a PNG, a JPEG or the like.") from None
    except (OSError, SyntaxError, ValueError) as error:  # PIL raises either for a file that ends early or has a bad header
        if isinstance(error, InputError):
            raise
        if getattr(error, "errno", None) is not None:  # the system's error, not PIL's
            raise InputError(f"{path} cannot be read: {error.strerror}. Expected the path of a picture file.") from None
        raise InputError(f"{name} is damaged: {error}. Save the picture again, and use the new file.") from None


def _too_large(name: str, megapixels: str) -> InputError:
    return InputError(f"{name} has {megapixels} megapixels; expected at most {MEGAPIXELS}. Make the picture smaller.")


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any image to RGB: deep greys scaled to 8 bits, transparent parts on white, the first frame of an animation."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        if image.mode == "La":  # PIL converts La to RGBA only by way of LA
            image = image.convert("LA")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """A grey image of 16 or 32 bits as uint8, (H, W)."""
    depth = np.nan_to_num(np.asarray(image).astype(np.float32), posinf=0, neginf=0).clip(0)
    # Modes I and F do not say which value is white: take the first usual one that the image does not exceed.
    white = 65535 if image.mode.startswith("I;16") else next(top for top in (1, 255, 65535, depth.max()) if depth.max() <= top)
    return (depth * (255 / white)).round().astype(np.uint8)


def to_pil(processor: ProcessorMixin, pixels: torch.Tensor) -> list[Image.Image]:
    """Makes PIL images of decoded pixels.

    Args:
        processor: The adapter's or the base's; its image processor may work with torchvision or with PIL.
        pixels: The pixels before postprocessing, (B, 3, H, W).
    """
    drawn = processor.postprocess(list(pixels.float().cpu()))["pixel_values"]
    if isinstance(drawn[0], Image.Image):
        return drawn
    return [Image.fromarray(np.asarray(image).transpose(1, 2, 0)) for image in drawn]  # (3, H, W); a tensor with torchvision
