"""The demo page with bases of other families: one whose images are words, and one that only reads."""

import pytest

pytest.importorskip("gradio", reason='the demo page needs gradio: pip install -c constraints.txt -e ".[demo]"')

import gradio as gr
import torch
from demo.page import Page
from helpers import attach
from specs import SPECS

BY_NAME = {spec.name: spec for spec in SPECS}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """By family: its page, and the folder of an adapter."""

    def made(name: str) -> tuple[Page, str]:
        folder, adapter = tmp_path_factory.mktemp(name), tmp_path_factory.mktemp(f"{name}-adapter")
        torch.manual_seed(0)
        processor = BY_NAME[name].make_processor()
        base = BY_NAME[name].make_model(processor).eval()
        for part in (base, processor):
            part.save_pretrained(folder)
        attach(base).save_pretrained(adapter, processor=processor, base_model=str(folder))
        return Page(str(folder), "cpu", do_sample=True, guidance_scale=2.0), str(adapter)

    return {name: made(name) for name in ("emu3", "chameleon")}


def test_emu3_draws(pages):
    page, adapter = pages["emu3"]
    *_, (base_image, base_told, adapter_image, adapter_told) = page.draw("a red 3", 0, adapter)
    assert base_image.size == adapter_image.size
    assert "steps" in base_told
    assert "steps" in adapter_told


def test_a_base_that_cannot_draw_says_so_and_answers(pages, images, tmp_path):
    page, adapter = pages["chameleon"]
    with pytest.raises(gr.Error, match=r"This base cannot draw: .*Ask it about a picture instead"):
        next(page.draw("a red 3", 0, adapter))
    images[0].save(tmp_path / "scene.png")
    *_, answers = page.ask(str(tmp_path / "scene.png"), "How many digits are there?", adapter)
    assert len(answers) == 2
    facts, *choices = page.describe(adapter)
    assert facts == "This adapter reads a picture in **21** tokens (base: 64)."
    assert [choice.visible for choice in choices] == [False, False]


def test_an_adapter_of_another_base_is_refused_with_a_sentence(pages):
    (page, _), (_, adapter) = pages["emu3"], pages["chameleon"]
    with pytest.raises(gr.Error, match="chameleon"):
        page.describe(adapter)
    with pytest.raises(gr.Error, match="The adapter is empty"):
        page.describe(" ")
