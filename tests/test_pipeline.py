"""The diffusers pipeline: used directly, and found by plain diffusers in what was saved or pushed."""

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from copies import copied
from helpers import ANN, CAPTIONS, attach, drawing_inputs
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from uc_adapters import UniCompressModel, push_folder
from uc_adapters.errors import AdapterFileError, HubError, InputError, UnsupportedError
from uc_adapters.hub.pipeline_files import pipeline_files

pytest.importorskip("diffusers")
from diffusers import DiffusionPipeline

from uc_adapters.pipeline import UniCompressPipeline

CARDS = Path(__file__).parents[1] / "model_cards"
BASE, ADAPTER = "org/base", "org/uc4x"
STEPS = 16  # of a drawing by "strip" on the tiny base


@pytest.fixture(scope="module")
def pipe(pristine, processor):
    model = attach(copied(pristine))
    pipeline = UniCompressPipeline(model.compact_processor(processor), model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pushed(hub, pristine, processor, tmp_path, monkeypatch):
    """A base and an adapter on the Hub, with an empty cache to pull them into."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    pristine.push_to_hub(BASE, token=ANN)
    processor.push_to_hub(BASE, token=ANN)
    push(processor, seed=1)
    return hub


def push(processor, seed: int) -> None:
    attach(AutoModelForImageTextToText.from_pretrained(BASE), seed=seed).push_to_hub(ADAPTER, token=ANN, processor=processor)


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def same(ours: list[Image.Image], theirs: list[Image.Image]) -> bool:
    return len(ours) == len(theirs) and all(map(np.array_equal, ours, theirs))


# Drawing


def test_it_draws_what_the_documented_calls_draw():
    """On the shipped pair, with the calls of its card."""
    options = {"temperature": 0.7, "guidance_scale": 2.0}
    pipe = UniCompressPipeline.from_pretrained(CARDS / "tiny-janus-uc4x", base_model=CARDS / "tiny-janus")
    drawn = pipe(CAPTIONS[0], generator=torch.Generator().manual_seed(5), **options).images

    model = UniCompressModel.from_pretrained(CARDS / "tiny-janus-uc4x", base_model=CARDS / "tiny-janus")
    processor = AutoProcessor.from_pretrained(CARDS / "tiny-janus-uc4x")
    inputs = drawing_inputs(processor, CAPTIONS[:1])
    generator = torch.Generator().manual_seed(5)
    tokens = model.generate(**inputs, generation_mode="image", do_sample=True, generator=generator, **options)
    pixels = model.decode_image_tokens(tokens).permute(0, 3, 1, 2)
    pixels = processor.postprocess(list(pixels), return_tensors="pt")["pixel_values"][0]
    assert same(drawn, [Image.fromarray(pixels.permute(1, 2, 0).numpy())])


def test_a_seed_an_image(pipe):
    """Each image is the one that its prompt and its seed draw alone; those of one prompt stand behind each other."""
    together = pipe(CAPTIONS[:2], num_images_per_prompt=2, generator=seeds(1, 2, 3, 4)).images
    alone = [pipe(CAPTIONS[index // 2], generator=seeds(index + 1)).images[0] for index in range(4)]
    assert same(together, alone)
    assert not np.array_equal(together[0], together[1])


def test_output_types(pipe):
    def draw(output_type: str, **kwargs):
        return pipe(CAPTIONS[:2], generator=torch.Generator().manual_seed(0), output_type=output_type, **kwargs)

    images = draw("pil").images
    array, tensor = draw("np").images, draw("pt").images
    assert images[0].size == (64, 64)
    assert array.shape == (2, 64, 64, 3)
    assert tensor.shape == (2, 3, 64, 64)
    assert np.array_equal(np.rint(array * 255), np.stack(images))
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert same(draw("pil", return_dict=False)[0], images)


def test_guidance_and_negative_prompts(pipe):
    def draw(**kwargs):
        return pipe(CAPTIONS[:2], generator=torch.Generator().manual_seed(0), output_type="np", **kwargs).images

    default, own = draw(), pipe.model.family.base.generation_config.guidance_scale
    assert np.array_equal(draw(guidance_scale=own), default)
    assert not np.array_equal(draw(guidance_scale=1.0), default)
    assert not np.array_equal(draw(negative_prompt="a cyan 9"), default)
    assert np.array_equal(draw(negative_prompt="a cyan 9"), draw(negative_prompt=["a cyan 9"] * 2))
    # A prompt that guidance leads away from itself: the difference is none
    assert np.array_equal(draw(negative_prompt=CAPTIONS[:2]), draw(guidance_scale=1.0))
    assert np.array_equal(draw(negative_prompt=""), default)
    assert np.array_equal(draw(negative_prompt=["", " "]), default)


def test_callback_and_progress_bar(pipe, capsys):
    called = []

    def note(*arguments) -> None:
        called.append(arguments)

    pipe(CAPTIONS[0], callback_on_step_end=note)
    assert called == [(pipe, step, step, {}) for step in range(STEPS)]
    assert capsys.readouterr().err == ""
    try:
        pipe.set_progress_bar_config(disable=False, desc="drawing")
        pipe(CAPTIONS[0], num_images_per_prompt=2)
        assert f"{STEPS}/{STEPS}" in capsys.readouterr().err
        pipe(CAPTIONS[0], num_images_per_prompt=2, generator=seeds(1, 2))  # on a CPU, one behind the other
        assert f"{2 * STEPS}/{2 * STEPS}" in capsys.readouterr().err
    finally:
        pipe.set_progress_bar_config(disable=True)


def test_a_callback_ends_a_drawing(pipe):
    def stop(_, step, *__) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(CAPTIONS[0], callback_on_step_end=stop)
    assert len(pipe(CAPTIONS[0]).images) == 1


def test_other_precision(pristine, processor):
    model = attach(copied(pristine))
    pipe = UniCompressPipeline(model.compact_processor(processor), model)
    assert pipe.to("cpu", torch.bfloat16) is pipe
    assert (pipe.device, pipe.dtype) == (torch.device("cpu"), torch.bfloat16)
    assert len(pipe(CAPTIONS[0]).images) == 1


# Plain diffusers; hub/test_share.py has it in a process where nothing of ours is imported


def test_plain_diffusers_draws_at_the_revision_it_was_asked_for(pushed, processor, tmp_path):
    """The generic loader tells a pipeline neither revision nor cache, and the model is loaded later."""
    pushed.repos[ADAPTER].tags["v1.0"] = pushed.repos[ADAPTER].branches["main"]
    push(processor, seed=2)

    def draw(pipe):
        return pipe(CAPTIONS[0], generator=seeds(3), output_type="np").images

    first, second = (draw(UniCompressPipeline.from_pretrained(ADAPTER, revision=revision)) for revision in ("v1.0", "main"))
    assert not np.array_equal(first, second)
    cache = tmp_path / "other-cache"
    pipe = DiffusionPipeline.from_pretrained(ADAPTER, revision="v1.0", cache_dir=cache, trust_remote_code=True)
    assert np.array_equal(draw(pipe), first)
    assert list(cache.glob("models--org--*/snapshots/*/*.safetensors"))
    assert np.array_equal(draw(DiffusionPipeline.from_pretrained(ADAPTER, trust_remote_code=True)), second)


def test_plain_diffusers_draws_from_a_folder(pipe, base_folder, tmp_path):
    """What a pipeline saves is an adapter's folder, with the pipeline in it."""
    pipe.save_pretrained(tmp_path, base_model=str(base_folder))
    found = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True).to(torch.float64)
    assert (type(found), found.dtype) == (UniCompressPipeline, torch.float64)
    theirs, ours = (each(CAPTIONS[0], generator=seeds(1)).images for each in (found.to(torch.float32), pipe))
    assert same(theirs, ours)


def test_without_trust_nothing_of_a_repo_runs(pushed):
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(ADAPTER)


def test_pushing_an_older_folder_adds_the_pipeline(pushed, pipe, tmp_path):
    folder = tmp_path / "folder"
    pipe.model.save_pretrained(folder, processor=pipe.processor)
    for name in pipeline_files("janus"):
        (folder / name).unlink()
    push_folder(folder, "org/older", token=ANN, base_model=BASE)
    files = pushed.repos["org/older"].files()
    assert {name: files[name].decode() for name in pipeline_files("janus")} == pipeline_files("janus")


def test_the_shipped_adapter_carries_the_pipeline():
    folder = CARDS / "tiny-janus-uc4x"
    assert {name: (folder / name).read_text() for name in pipeline_files("janus")} == pipeline_files("janus")


def test_where_the_package_is_missing_the_repo_says_so(tmp_path):
    (tmp_path / "pipeline.py").write_text(pipeline_files("janus")["pipeline.py"])
    code = "import sys; sys.modules['uc_adapters'] = None; import pipeline"
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "expected uc-adapters with its extra 'diffusers'" in ended.stderr


# Bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "prompt=None; expected a text"),
        ({"prompt": []}, r"prompt=\[\]; expected a text"),
        ({"prompt": "  "}, "none of them empty"),
        ({"prompt": ["a red 3", 3]}, "expected a text"),
        ({"prompt": "red " * 1000}, r"A prompt of \d+ tokens is too long for the base: expected at most \d+"),
        ({"negative_prompt": "red " * 1000}, r"A negative prompt of \d+ tokens is too long"),
        ({"prompt": "a <image_placeholder> b"}, "has the image token <image_placeholder> in its text; expected words alone"),
        ({"negative_prompt": "<begin_of_image>"}, "has the image token <begin_of_image> in its text"),
        ({"negative_prompt": ["red", ""]}, "expected a text, or a list of texts, none of them empty"),
        ({"negative_prompt": ["a", "b"]}, r"2 negative prompts for 1 prompt\(s\)"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0; expected a whole number"),
        ({"num_images_per_prompt": 3, "generator": seeds(1, 2)}, r"a list of 2 for 3 image\(s\)"),
        ({"generator": "3"}, "expected a torch.Generator"),
        ({"output_type": "latent"}, "output_type='latent'; expected one of 'pil'"),
        ({"height": 128}, "height=128, width=None; expected 64 for both"),
        ({"generation_kwargs": {"num_inference_steps": 20}}, "got num_inference_steps"),
        ({"temperature": 0.0}, "temperature"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0"),
    ],
)
def test_bad_input_is_one_sentence(pipe, arguments, words):
    with pytest.raises(InputError, match=words):
        pipe(**({"prompt": "a red 3"} if arguments else {}) | arguments)


def test_a_prompt_fits_until_the_context_is_full(pipe):
    context = pipe.model.config.get_text_config().max_position_embeddings
    words = context - 64 - drawing_inputs(pipe.processor, ["red"])["input_ids"].shape[1] + 1
    assert len(pipe("red " * words).images) == 1
    with pytest.raises(InputError, match=f"expected at most {context - 64}"):
        pipe("red " * (words + 1))


def test_a_disabled_adapter(pipe):
    with pipe.model.disable_adapter(), pytest.raises(InputError, match="The adapter is disabled"):
        pipe("a red 3")


def test_beams_cannot_draw(pipe):
    with pytest.raises(UnsupportedError, match="num_beams=2"):
        pipe("a red 3", generation_kwargs={"num_beams": 2})


def test_fields_of_the_generation_config(pipe):
    def draw(**arguments):
        return pipe(CAPTIONS[0], generator=torch.Generator().manual_seed(0), output_type="np", **arguments).images

    assert np.array_equal(draw(temperature=0.5, top_k=9), draw(generation_kwargs={"temperature": 0.5, "top_k": 9}))
    assert np.array_equal(draw(top_k=1), draw(generation_kwargs={"do_sample": False}))
    assert not np.array_equal(draw(top_p=0.1), draw())


def test_a_server_reads_the_arguments_from_the_signature(pipe):
    """SGLang and vLLM-Omni leave out what a pipeline does not name, such as denoising steps; hf-serve passes None for no n."""
    arguments = inspect.signature(pipe.__call__).parameters
    assert not [name for name, argument in arguments.items() if argument.kind is argument.VAR_KEYWORD]
    assert "num_inference_steps" not in arguments
    everything_left_out = {name: None for name in arguments if name not in ("prompt", "output_type", "return_dict")}
    assert len(pipe(CAPTIONS[0], **everything_left_out).images) == 1


@pytest.mark.usefixtures("hub")
def test_an_id_that_is_none(tmp_path):
    with pytest.raises(HubError, match="'org/none' is no folder here"):
        UniCompressPipeline.from_pretrained("org/none", cache_dir=tmp_path)


def test_a_folder_without_a_processor(tmp_path):
    with pytest.raises(AdapterFileError, match="No processor could be loaded from"):
        UniCompressPipeline.from_pretrained(tmp_path)


def test_a_pipeline_without_a_model(pipe):
    with pytest.raises(InputError, match="The pipeline has no model"):
        UniCompressPipeline(pipe.processor)("a red 3")
