"""Decoded pixels become pictures with either backend of transformers' image processors."""

import copy
import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_world import tiny_emu3

from uc_adapters.families import FAMILIES
from uc_adapters.pictures import to_pil

ROOT = Path(__file__).parents[2]
BACKENDS = {
    "PIL": ("image_processing_pil_janus", "JanusImageProcessorPil"),
    "torchvision": ("image_processing_janus", "JanusImageProcessor"),
}


@pytest.fixture(params=BACKENDS)
def janus(request, processor):
    if request.param == "torchvision":
        pytest.importorskip("torchvision", exc_type=ImportError)
    module, name = BACKENDS[request.param]
    backend = getattr(import_module(f"transformers.models.janus.{module}"), name)
    processor = copy.deepcopy(processor)
    processor.image_processor = backend.from_dict(processor.image_processor.to_dict())
    return processor


@pytest.fixture(scope="module")
def pixels():
    """Two decoded images, here and there beyond their range, (2, 3, H, W)."""
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1


def expected(pixels: torch.Tensor) -> np.ndarray:
    return (pixels * 127.5 + 127.5).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def assert_pictures(images: list[Image.Image], pixels: torch.Tensor) -> None:
    assert [image.mode for image in images] == ["RGB"] * len(pixels)
    assert np.abs(np.stack(images).astype(int) - expected(pixels)).max() <= 1


def test_the_recipes_pictures_of_janus(janus, pixels):
    assert_pictures(to_pil(janus, pixels), pixels)


def test_the_recipes_pictures_of_emu3(pixels):
    assert_pictures(to_pil(tiny_emu3.make_processor(32 * 32, 64 * 64), pixels), pixels)


def test_the_pictures_of_the_cards_snippet(janus, pixels):
    """Its last lines, from the decoded pixels on."""
    *_, to_uint8, to_image = FAMILIES["janus"].drawing_snippet.splitlines()
    names = {"processor": janus, "pixels": pixels, "Image": Image}
    exec(f"{to_uint8}\n{to_image}", names)
    assert_pictures([names["image"]], pixels[:1])


@pytest.mark.parametrize("file", ["README.md", "model_cards/tiny-janus-uc4x/README.md"])
def test_the_pictures_of_the_readmes_snippet(file):
    line = re.search(r"^pixels = processor\.postprocess.*$", (ROOT / file).read_text(), re.MULTILINE)[0]
    assert line == FAMILIES["janus"].drawing_snippet.splitlines()[-2]


def test_no_snippet_asks_for_what_one_backend_lacks():
    """torchvision's knows no return_tensors="PIL.Image.Image"."""
    texts = [family.drawing_snippet for family in FAMILIES.values()]
    texts += [
        path.read_text()
        for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "model_cards/tiny-janus-uc4x/README.md")
    ]
    assert not [text for text in texts if "PIL.Image.Image" in text]
