"""The checkpoints in model_cards/ are whole, small, and read and draw as their cards say."""

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate_scenes import EvaluateArguments
from helpers import rng
from quickstart import shipped_pictures
from rows.turns import CAPTION_REQUEST
from safetensors import safe_open
from scoring.contenders import answer, contenders, draw, drawn_steps, read_tokens, sampling_of
from scoring.scene_scores import SPLIT, score_drawing, score_reading
from scoring.stock_calls import calls_of, drawing_inputs
from tiny_world.digits import random_scene
from tiny_world.tiny_words import split_words

from uc_adapters import UniCompressModel

CARDS = Path(__file__).parents[1] / "model_cards"
BASE, ADAPTER = str(CARDS / "tiny-janus"), str(CARDS / "tiny-janus-uc4x")
EMOJI_BASE, EMOJI_ADAPTER = str(CARDS / "emoji-janus"), str(CARDS / "emoji-janus-uc4x")
MIB = 2**20


@pytest.fixture(scope="module")
def pair():
    return contenders(BASE, ADAPTER)


@pytest.mark.parametrize(("folder", "most"), [(BASE, 7), (ADAPTER, 10), (EMOJI_BASE, 40), (EMOJI_ADAPTER, 15)])
def test_a_repo_folder_is_complete_and_small(folder, most):
    names = {path.name for path in Path(folder).iterdir()}
    assert {"README.md", "processor_config.json", "tokenizer.json"} <= names
    assert sum(path.stat().st_size for path in Path(folder).iterdir()) <= most * MIB


@pytest.mark.parametrize("folder", [ADAPTER, EMOJI_ADAPTER])
def test_the_adapters_file_holds_no_base_weight(folder):
    with safe_open(Path(folder, "adapter_model.safetensors"), framework="pt") as file:
        assert all(".lora_" in name for name in file.keys())  # noqa: SIM118  (safe_open is no dict)


def test_base_and_adapter_read_and_draw_held_out_digits(pair):
    # 60 scenes: wide enough bounds for any seed; the figures of the README come from 500
    random, told = rng(77), EvaluateArguments(base=BASE)
    scenes = [random_scene(random, SPLIT) for _ in range(60)]
    sampling = {"do_sample": True, "temperature": told.temperature, "guidance_scale": told.guidance_scale}
    reading = [score_reading(contender, scenes, 77).estimates["mean"].value for contender in pair]
    drawn = score_drawing(pair, scenes, 77, 60, **sampling)
    drawing = [drawn[contender.name].estimates["quarters"].value for contender in pair]
    assert reading[0] >= 0.95
    assert drawing[0] >= 0.85
    assert reading[1] >= reading[0] - 0.03
    assert drawing[1] >= drawing[0] - 0.04
    assert [read_tokens(contender.processor) for contender in pair] == [64, 21]
    assert [drawn_steps(contender) for contender in pair] == [64, 16]


def test_a_prompt_draws_the_same_alone_and_in_a_batch(pair):
    adapter = pair[1]
    prompts = [
        "a red 3 at the top left",
        "a blue 7 at the top right and a cyan 0 at the bottom left",
        "a green 1 at the top left",
    ]

    def tokens(prompts: list[str]) -> torch.Tensor:
        inputs = drawing_inputs(adapter.processor, prompts, calls_of(adapter.model))
        return adapter.model.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=2.0)

    together = tokens(prompts)
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(tokens([prompt])[0], row)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_base_is_recognised_in_half_precision(dtype, recwarn):
    UniCompressModel.from_pretrained(ADAPTER, base_model=BASE, dtype=dtype)
    assert not [warning for warning in recwarn if "was trained on" in str(warning.message)]


def test_base_and_adapter_draw_and_read_the_emoji_that_they_know_by_heart():
    # 12 of the 407 captions: wide enough bounds for any seed; docs/figures/pictures.md has 94.5 % and 93.7 % of all
    shown = shipped_pictures()
    real = np.stack([np.asarray(picture.image, dtype=float) for picture in shown])  # (N, 64, 64, 3)
    known = shown[:12]
    for contender, least in zip(contenders(EMOJI_BASE, EMOJI_ADAPTER), (9, 9), strict=True):
        torch.manual_seed(77)
        drawn, _ = draw(contender, [picture.truth for picture in known], **sampling_of(0.7, None))
        nearest = [np.square(real - np.asarray(image, dtype=float)).mean((1, 2, 3)).argmin() for image in drawn]
        assert sum(index == place for place, index in enumerate(nearest)) >= least
        told = answer(contender, [picture.image for picture in known], [CAPTION_REQUEST] * len(known))
        assert sum(split_words(text) == split_words(picture.truth) for text, picture in zip(told, known, strict=True)) >= 9
