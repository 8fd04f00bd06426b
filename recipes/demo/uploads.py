"""What people upload becomes a picture, or a sentence that says why not."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError
from rows.conversations import to_rgb

from uc_adapters.errors import InputError

MEGAPIXELS = 50  # of a phone's largest photo; one as large takes 150 MB of memory
LONGEST_SIDE = 1024  # no base reads more


def read_picture(path: str) -> Image.Image:
    """Reads a file as the recipes train on images: upright, RGB, white where it is transparent.

    Args:
        path: The file.

    Returns:
        The picture, no side longer than 1,024 pixels.

    Raises:
        InputError: The file is no picture, is damaged, or has more than 50 megapixels. Too large a picture is not decoded.
    """
    name = Path(path).name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the check below is stricter
            image = Image.open(path)
        with image:
            _check_size(name, image.width * image.height)
            picture = to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        raise InputError(_too_large(name, f"more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f}")) from None
    except UnidentifiedImageError:
        raise InputError(f"{name} is no picture that can be read; expected a PNG, a JPEG or the like.") from None
    except (OSError, SyntaxError, ValueError) as error:  # PIL has several words for a file that ends early or lies
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name} is damaged: {error}. Save the picture again, and upload the new file.") from None
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return picture


def _check_size(name: str, pixels: int) -> None:
    if pixels > MEGAPIXELS * 1e6:
        raise InputError(_too_large(name, f"{pixels / 1e6:.0f}"))


def _too_large(name: str, megapixels: str) -> str:
    return f"{name} has {megapixels} megapixels; expected at most {MEGAPIXELS}. Make the picture smaller, and upload it again."
