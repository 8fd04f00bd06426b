"""The card of each family: what it says holds for this kind of base, and its snippets run as pasted."""

import re

import pytest
import torch
from helpers import ANN, attach
from huggingface_hub import ModelCard
from PIL import Image
from specs import SPECS
from transformers import AutoModelForImageTextToText

from uc_adapters.families import FAMILIES, make_loadable

BASE, ADAPTER = "org/base", "org/adapter"


@pytest.fixture(params=SPECS, ids=lambda spec: spec.name)
def spec(request):
    return request.param


@pytest.fixture
def processor(spec):
    return spec.make_processor()


@pytest.fixture
def base(spec, processor, tmp_path):
    """A folder with a base, as the Hub has it."""
    torch.manual_seed(0)
    spec.make_model(processor).save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def card(hub, spec, base, processor, tmp_path, monkeypatch):
    """The card of an adapter on the Hub; the folder is an empty one, but for a picture, and so is the cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.create(BASE, {path.name: path.read_bytes() for path in base.iterdir()})
    make_loadable(spec.name)
    model = attach(AutoModelForImageTextToText.from_pretrained(BASE))
    model.push_to_hub(ADAPTER, token=ANN, processor=processor)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    Image.new("RGB", (64, 64), "red").save("image.png")
    return ModelCard(hub.repos[ADAPTER].files()["README.md"].decode())


def snippets(card: ModelCard) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)


def run(snippet: str) -> dict:
    """What a snippet defines. The published Emu3's 720 x 720 pixels would take minutes: here they are 64 x 64."""
    names = {}
    exec(compile(snippet.replace('ratio="1:1"', 'ratio="1:1", image_area=64 * 64'), "README.md", "exec"), names)
    return names


def test_the_card_is_true_and_its_snippets_run(spec, card, tmp_path, capsys):
    family = FAMILIES[spec.name]
    why_no_drawing = family.why_no_drawing
    assert card.data.base_model == BASE
    task = "any-to-any" if spec.draws else "image-text-to-text"
    assert card.data.pipeline_tag == ("text-to-image" if family.why_no_answers else task)
    assert ("and what it draws" in card.text) is (spec.draws and family.compresses_reading)
    assert ("steps of the language model to draw" in card.text) is spec.draws
    assert spec.draws or f"It reads, and cannot draw: {why_no_drawing}" in card.text
    assert str(tmp_path) not in str(card)
    assert "pip install uc-adapters" not in str(card)

    first, *others = snippets(card)
    if family.why_no_pixels:  # test_glm_image_pipeline.py runs its snippet, on a tiny diffusion model
        assert others == []
        return
    run(first)
    assert capsys.readouterr().out.endswith("\n")  # an answer
    assert ("drawing.png" in [path.name for path in (tmp_path / "elsewhere").iterdir()]) is spec.draws
    assert len(others) == spec.draws
    if spec.draws:
        pytest.importorskip("diffusers")
        assert run(others[0])["image"].size == Image.open("drawing.png").size


def test_the_card_of_an_adapter_on_a_folder(spec, base, processor, tmp_path, monkeypatch):
    """It gives no path of this machine; its one snippet runs once the reader has put in theirs."""
    make_loadable(spec.name)
    model = attach(AutoModelForImageTextToText.from_pretrained(base))
    model.save_pretrained(tmp_path / "adapter", processor=processor)
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert str(tmp_path) not in text
    (snippet,) = snippets(ModelCard(text))
    if FAMILIES[spec.name].why_no_pixels:
        return
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "red").save("image.png")
    run(snippet.replace("path/to/base", str(base)))
    assert (tmp_path / "drawing.png").exists() is spec.draws
