"""What is exact on a CPU is exact on a GPU, with the shipped pair. Skipped where there is no GPU.

`TEST_DEVICE=cpu pytest tests/gpu` rehearses on a CPU all that needs no GPU of its own.
"""

import copy
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from finetuning.base import quantisation
from helpers import drawing_inputs, question_inputs
from tiny_world.digits import DESCRIBE
from transformers import AutoModelForImageTextToText, AutoProcessor, CompileConfig

from uc_adapters import UniCompressModel
from uc_adapters.families import family_of

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
CARDS = Path(__file__).parents[2] / "model_cards"
BASE, ADAPTER = str(CARDS / "tiny-janus"), str(CARDS / "tiny-janus-uc4x")
PROMPTS = ["a red 3 at the top left", "a blue 7 at the bottom right and a green 1 at the top left"]

pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no GPU")
needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="rehearsed on a CPU")


@pytest.fixture(scope="module")
def base():
    assert not torch.backends.cuda.matmul.allow_tf32  # PyTorch's default: float32 is float32
    return AutoModelForImageTextToText.from_pretrained(BASE).eval().to(DEVICE)


@pytest.fixture(scope="module")
def model(base):
    return UniCompressModel.from_pretrained(copy.deepcopy(base), ADAPTER).eval()


@pytest.fixture(scope="module")
def dense_processor():
    return AutoProcessor.from_pretrained(BASE)


@pytest.fixture(scope="module")
def short():
    return AutoProcessor.from_pretrained(ADAPTER)


@pytest.fixture(scope="module")
def image(images):
    return images[0]


@pytest.fixture(scope="module")
def prompts(short):
    return drawing_inputs(short, PROMPTS, padding_side="left").to(DEVICE)


@pytest.fixture(scope="module")
def drawn(model, prompts):
    """The codes of the two prompts, (2, 64)."""
    return draw(model, prompts)


def draw(model, inputs, **options) -> torch.Tensor:
    return model.generate(**inputs, **{"generation_mode": "image", "do_sample": False, "guidance_scale": 3.0, **options})


def ask(model, processor, image) -> str:
    inputs = question_inputs(processor, [DESCRIBE], [image]).to(model.device, model.dtype)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=40)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def compiled() -> dict:
    """Keywords of `generate` that compile the steps. On a GPU the static cache alone does."""
    if DEVICE == "cuda":
        return {"cache_implementation": "static"}
    config = CompileConfig(mode=None, dynamic=False)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def test_a_disabled_adapter_is_the_base(base, model, dense_processor, image):
    inputs = drawing_inputs(dense_processor, PROMPTS[:1]).to(DEVICE)
    with model.disable_adapter():
        assert torch.equal(draw(model, inputs), draw(base, inputs))
        assert ask(model, dense_processor, image) == ask(base, dense_processor, image)


def test_a_prompt_draws_the_same_alone_and_in_a_batch(model, short, drawn):
    for prompt, codes in zip(PROMPTS, drawn, strict=True):
        assert torch.equal(draw(model, drawing_inputs(short, [prompt]).to(DEVICE))[0], codes)


def test_seeds_draw_the_same_alone_and_in_a_batch(model, short, prompts):
    def seeded(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator(DEVICE).manual_seed(seed) for seed in seeds]

    together = draw(model, prompts, do_sample=True, generator=seeded(1, 2))
    for seed, prompt, codes in zip((1, 2), PROMPTS, together, strict=True):
        alone = draw(model, drawing_inputs(short, [prompt]).to(DEVICE), do_sample=True, generator=seeded(seed))
        assert torch.equal(alone[0], codes)


def test_the_cache_and_the_compiler_change_no_code(model, prompts, drawn):
    static = {"cache_implementation": "static"}
    assert torch.equal(draw(model, prompts, **static, disable_compile=True), drawn)
    assert torch.equal(draw(model, prompts, cache_implementation="dynamic"), drawn)
    for _ in range(3):  # on a GPU, the first drawing warms up, the second records CUDA graphs, the third replays them
        assert torch.equal(draw(model, prompts, **compiled()), drawn)


def test_a_compiled_merged_adapter_draws_the_same(model, prompts, drawn):
    with model.merged_adapter():
        assert torch.equal(draw(model, prompts, **compiled()), drawn)
    assert torch.equal(draw(model, prompts), drawn)


def test_a_compiled_drawing_samples_anew_each_time(model, prompts):
    torch.manual_seed(0)
    sampled = [draw(model, prompts, do_sample=True, temperature=2.0, **compiled()) for _ in range(3)]
    assert len(torch.cat(sampled).unique(dim=0)) == 6


@pytest.mark.parametrize("how", ["autocast", "bfloat16", "float16"])
def test_half_precision_draws_and_reads(base, model, short, prompts, drawn, image, how):
    context, half = nullcontext(), model
    if how == "autocast":
        context = torch.autocast(DEVICE, dtype=torch.bfloat16)
    else:
        half = UniCompressModel.from_pretrained(copy.deepcopy(base).to(getattr(torch, how)), ADAPTER).eval()
    with context, torch.no_grad():
        codes, answer = draw(half, prompts), ask(half, short, image)
    assert answer == ask(model, short, image)
    # Close choices fall otherwise, and what follows differs: only what is drawn is the same
    family = family_of(base)
    pixels = [family.to_pixels(of, (8, 8)).float() for of in (codes, drawn)]
    assert (pixels[0] - pixels[1]).abs().mean() < 0.25  # of a range of 2


def test_a_merged_adapter_draws_the_same(base, model, prompts, drawn):
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with model.merged_adapter():
        assert torch.equal(draw(model, prompts), drawn)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


@needs_gpu
def test_on_a_gpu_it_merges_to_draw(model, prompts, drawn):
    model.merge_if_room()
    assert model.get_base_model().model.language_model.layers[0].mlp.up_proj.merged
    model.unmerge_adapter()


@needs_gpu
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantised_base_draws_and_reads(short, prompts, image, bits):
    pytest.importorskip("bitsandbytes")
    base = AutoModelForImageTextToText.from_pretrained(BASE, quantization_config=quantisation(BASE, bits), device_map=DEVICE)
    quantised = UniCompressModel.from_pretrained(base.eval(), ADAPTER).eval()
    codes = draw(quantised, prompts)
    assert codes.shape == (2, 64)
    dynamic = draw(quantised, prompts, cache_implementation="dynamic")
    assert (dynamic == codes)[:, :4].all()  # quantised layers round what a static cache adds up in another order
    assert ask(quantised, short, image)


@needs_gpu
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "dynamic"}, {"do_sample": True}])
def test_no_step_waits_for_the_device(model, prompts, options):
    steps = []

    def forbid_waiting() -> None:
        steps.append(None)
        torch.cuda.set_sync_debug_mode("default" if len(steps) == 16 else "error")

    try:
        draw(model, prompts, progress=forbid_waiting, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == 16


@needs_gpu
def test_a_training_step_is_the_cpus(base, short, image):
    def gradients(device: str) -> dict[str, torch.Tensor]:
        model = UniCompressModel.from_pretrained(copy.deepcopy(base).to(device), ADAPTER, is_trainable=True)
        model.train_only("language model")
        pixels = short.image_processor(images=[image], return_tensors="pt")["pixel_values"].to(device)
        ids = drawing_inputs(short, PROMPTS[:1])["input_ids"]
        placeholders = torch.full((1, 17), model.config.image_token_id)
        drawing = torch.cat([ids, placeholders], 1).to(device)
        mask = torch.zeros_like(drawing, dtype=torch.bool)
        mask[:, -17:] = True
        labels = drawing.masked_fill(~mask, -100)
        labels[:, -17] = -100  # the separator
        loss = model(input_ids=drawing, labels=labels, gen_pixel_values=pixels, gen_mask=mask).loss
        question = question_inputs(short, [DESCRIBE], [image]).to(device)
        loss = loss + model(**question, labels=question["input_ids"].masked_fill(question["input_ids"] < 5, -100)).loss
        loss.backward()
        found = {name: parameter.grad.cpu() for name, parameter in model.named_parameters() if parameter.grad is not None}
        return found | {"loss": loss.detach().cpu()}

    here, there = gradients("cpu"), gradients(DEVICE)
    assert here.keys() == there.keys()
    assert len(here) > 20
    # Some gradients are zero but for rounding: attention to one key gives its query none
    small = 1e-4 * max(gradient.abs().max().item() for gradient in here.values())
    for name, gradient in here.items():
        torch.testing.assert_close(there[name], gradient, rtol=1e-3, atol=small, msg=name)
