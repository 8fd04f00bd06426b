"""The diffusers pipeline with the other families: Emu3's sizes, and a base that cannot draw."""

import numpy as np
import pytest
import tiny_chameleon
import torch
from helpers import attach, chat
from tiny_world import tiny_emu3

from uc_adapters.errors import InputError, UnsupportedError

pytest.importorskip("diffusers")
from diffusers import DiffusionPipeline

from uc_adapters.pipeline import UniCompressPipeline

CAPTIONS = ["a red 3", "a blue 7 at the bottom right"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An Emu3 and an adapter of it."""
    torch.manual_seed(0)
    processor = tiny_emu3.make_processor(32 * 32, 64 * 64)
    base, adapter = tmp_path_factory.mktemp("emu3"), tmp_path_factory.mktemp("emu3-uc4x")
    model = tiny_emu3.make_model(processor).eval()
    model.save_pretrained(base)
    attach(model).save_pretrained(adapter, processor=processor, base_model=str(base))
    return base, adapter


@pytest.fixture(scope="module")
def emu3(folders):
    pipeline = DiffusionPipeline.from_pretrained(folders[1], trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipe, **kwargs) -> np.ndarray:
    return pipe(CAPTIONS, generator=torch.Generator().manual_seed(2), output_type="np", **kwargs).images


@pytest.mark.parametrize(
    ("size", "expected"), [({}, (64, 64)), ({"height": 32, "width": 64}, (32, 64)), ({"width": 48}, (64, 48))]
)
def test_emu3_draws_the_size_it_is_asked_for(emu3, size, expected):
    assert draw(emu3, **size).shape == (2, *expected, 3)


def test_emu3_draws_what_its_documented_calls_draw(emu3):
    drawn = draw(emu3, height=32, width=64, guidance_scale=3.0, negative_prompt="a cyan 9")
    processor, model = emu3.processor, emu3.model
    size = {"return_for_image_generation": True, "ratio": "2:1", "image_area": 32 * 64, "padding": True, "return_tensors": "pt"}
    inputs = processor(text=[chat(processor, caption) for caption in CAPTIONS], **size)
    negative = processor(text=[chat(processor, "a cyan 9")], return_tensors="pt")["input_ids"]
    tokens = model.generate(
        **inputs,
        generation_mode="image",
        do_sample=True,
        guidance_scale=3.0,
        negative_prompt_ids=negative,
        generator=torch.Generator().manual_seed(2),
    )
    height, width = inputs["image_sizes"][0]
    pixels = [model.decode_image_tokens(image_tokens=own, height=height, width=width)[0] for own in tokens.split(1)]
    images = processor.postprocess(pixels)["pixel_values"]
    assert np.array_equal(np.rint(drawn * 255), np.stack(images))


@pytest.mark.parametrize("size", [{"height": 40, "width": 64}, {"height": 0}, {"width": -16}, {"width": 64.0}])
def test_emu3_refuses_sizes_that_are_no_grid(emu3, size):
    with pytest.raises(InputError, match="expected multiples of 16 pixels"):
        emu3("a red 3", **size)


def test_an_image_that_fills_the_context(emu3):
    with pytest.raises(InputError, match="too long for the base"):
        emu3("a red 3", height=256, width=256)


def test_a_base_that_cannot_draw_is_told_before_it_is_loaded(tmp_path):
    processor = tiny_chameleon.make_processor()
    attach(tiny_chameleon.make_model(processor)).save_pretrained(tmp_path, processor=processor, base_model="org/nowhere")
    for load in (UniCompressPipeline.from_pretrained, DiffusionPipeline.from_pretrained):
        with pytest.raises(UnsupportedError, match="A chameleon base cannot draw"):
            load(tmp_path, trust_remote_code=True)
