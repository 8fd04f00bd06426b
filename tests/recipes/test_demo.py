"""The demo page in a headless Chromium, with the shipped pair: what visitors do, and what they do wrong."""

import io
import re
import socket
import threading
from argparse import Namespace
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason='the demo page needs gradio: pip install -c constraints.txt -e ".[demo]"')
pytest.importorskip("playwright", reason='the demo page is tested by playwright: pip install -c constraints.txt -e ".[test]"')

import gradio as gr
import torch
import yaml
from demo import app, make_space, screenshots
from demo.race import race
from demo.screenshots import PATIENCE, finish, opened, start
from helpers import small_config
from PIL import Image
from playwright.sync_api import expect
from scoring.contenders import answer, draw
from test_layout import graph
from transformers import AutoModelForImageTextToText

from uc_adapters import get_uc_model
from uc_adapters.errors import InputError
from uc_adapters.pictures import open_picture

ROOT = Path(__file__).parents[2]
BASE, ADAPTER = str(ROOT / "model_cards/tiny-janus"), str(ROOT / "model_cards/tiny-janus-uc4x")
PROMPTS = ["a red 3 at the top left", "a blue 7 at the bottom right"]


@pytest.fixture(scope="module")
def page():
    return screenshots.shipped()


@pytest.fixture(scope="module")
def address(page, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        with screenshots.served(page) as address:
            yield address


@pytest.fixture(scope="module")
def browser():
    try:
        with screenshots.chromium() as browser:
            yield browser
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture
def visit(browser, address):
    """Opens the page as another visitor."""
    tabs = []

    def opens():
        tabs.append(opened(browser, address))
        return tabs[-1]

    yield opens
    for tab in tabs:
        tab.context.close()


@pytest.fixture(scope="module")
def own_tab(browser, address):
    return opened(browser, address)


@pytest.fixture
def tab(own_tab):
    """The page as a visitor finds it. To load it anew takes a third of the time of a new browser window."""
    own_tab.reload()
    return own_tab


def shown(tab) -> list[Image.Image]:
    """What base and adapter drew on the page."""
    pictures = tab.get_by_role("tabpanel").first.locator(".picture img")
    expect(pictures).to_have_count(2, timeout=PATIENCE)
    files = [tab.request.get(pictures.nth(index).get_attribute("src")).body() for index in range(2)]
    return [Image.open(io.BytesIO(file)).convert("RGB") for file in files]


def drawn_alone(page, prompt: str, seed: int) -> list[Image.Image]:
    """What base and adapter draw without a page."""
    pictures = []
    for contender in (page.base, page.adapter(ADAPTER)):
        torch.manual_seed(seed)
        pictures += draw(contender, [prompt], **page.sampling)[0]
    return pictures


def no_drawing_goes_on() -> bool:
    """Waits for the threads of all drawings to end: the page tells of the last step a moment before."""
    for thread in threading.enumerate():
        if thread.name == "drawing":
            thread.join(timeout=PATIENCE / 1000)
    return "drawing" not in [thread.name for thread in threading.enumerate()]


def told(tab, sentence: str) -> None:
    """Waits until the page tells the visitor something."""
    expect(tab.locator(".toast-body").filter(has_text=re.compile(sentence)).first).to_be_visible(timeout=PATIENCE)


def ask_tab(tab):
    tab.get_by_role("tab", name="Ask").click()
    return tab


def upload(tab, *paths: Path) -> None:
    tab.locator("input[type=file]").set_input_files(*paths)


def test_both_draw_a_prompt_while_steps_and_seconds_count(tab, page):
    tab.evaluate(
        "window.seen = []; const told = () => [...document.querySelectorAll('.told')];"  # the page may replace them
        "new MutationObserver(() => window.seen.push(told().map(line => line.innerText).join(' | ')))"
        ".observe(document.body, {subtree: true, childList: true, characterData: true})"
    )
    start(tab, PROMPTS[0], seed=5)
    finish(tab)
    assert no_drawing_goes_on()
    assert shown(tab) == drawn_alone(page, PROMPTS[0], seed=5)
    seen = "\n".join(tab.evaluate("window.seen"))
    for total in (64, 16):
        assert re.search(rf"step \d+ of {total}, \d+\.\d\d s", seen)


def test_two_visitors_at_once_each_get_their_own_drawing(tab, visit, page):
    tabs = [tab, visit()]
    for seed, (tab, prompt) in enumerate(zip(tabs, PROMPTS, strict=True)):
        start(tab, prompt, seed)
    for tab in tabs:
        finish(tab)
    assert no_drawing_goes_on()
    for seed, (tab, prompt) in enumerate(zip(tabs, PROMPTS, strict=True)):
        assert shown(tab) == drawn_alone(page, prompt, seed)


def test_a_visitor_who_leaves_does_not_block_the_next_one(tab, visit):
    leaving = visit()
    start(leaving, PROMPTS[0])
    expect(leaving.get_by_text(re.compile(r"step \d+ of 64|64 steps"))).to_be_visible(timeout=PATIENCE)
    leaving.context.close()
    start(tab, PROMPTS[1])
    finish(tab)
    assert no_drawing_goes_on()


def test_both_answer_a_question_about_a_shipped_picture(tab):
    ask_tab(tab).get_by_text("What colour is the 2?").click()
    expect(tab.get_by_label("Question")).to_have_value("What colour is the 2?")
    tab.get_by_role("button", name="Ask", exact=True).click()
    for name in ("Base", "Adapter"):
        expect(tab.get_by_label(f"{name} answers")).to_have_value(re.compile(r"^blue\n\(\d+\.\d\d s\)$"), timeout=PATIENCE)


def test_both_answer_a_question_about_an_upload(tab, images, tmp_path):
    images[0].save(tmp_path / "mine.jpg")
    upload(ask_tab(tab), tmp_path / "mine.jpg")
    expect(tab.locator(".picture img").last).to_be_visible(timeout=PATIENCE)
    tab.get_by_label("Question").fill("How many digits are there?")
    tab.get_by_role("button", name="Ask", exact=True).click()
    for name in ("Base", "Adapter"):
        expect(tab.get_by_label(f"{name} answers")).to_have_value(re.compile(r"^\d\n"), timeout=PATIENCE)


def bad_file(folder: Path, name: str) -> Path:
    """Writes a file that is no picture, or none that the page takes."""
    file = folder / name
    if name == "huge.png":
        Image.new("1", (10_000, 10_000)).save(file)
    elif name == "bomb.png":
        Image.new("1", (20_000, 10_000)).save(file)
    elif name == "cut.png":
        Image.effect_noise((64, 64), 50).save(file)
        file.write_bytes(file.read_bytes()[:600])
    else:
        file.write_text("a red 3")
    return file


BAD_FILES = {
    "words.png": "words.png is no picture that can be read; expected a PNG",
    "huge.png": "huge.png has 100 megapixels; expected at most 50",
    "bomb.png": "bomb.png has more than 179 megapixels; expected at most 50",
    "cut.png": "cut.png is damaged: .* Save the picture again",
}


def test_a_bad_file_is_refused_with_a_sentence(tab, tmp_path):
    ask_tab(tab)
    for name, sentence in {**BAD_FILES, "words.md": r"words.md"}.items():
        upload(tab, bad_file(tmp_path, name))
        told(tab, sentence)
    expect(tab.locator(".picture img")).to_have_count(0)


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused(name, tmp_path):
    with pytest.raises(InputError, match=BAD_FILES[name]):
        open_picture(bad_file(tmp_path, name))


def test_unknown_words_are_warned_of_and_no_words_refused(tab):
    start(tab, "a red fox at the <b>top</b> left")
    told(tab, "The model does not know fox, .*It reads each as the same unknown word")
    finish(tab)
    start(tab, "  ")
    told(tab, "The prompt is empty; expected at least one word")
    start(tab, "a red 3 " * 200)
    told(tab, "The prompt has 600 tokens; expected at most 500")
    ask_tab(tab).get_by_role("button", name="Ask", exact=True).click()
    told(tab, "There is no picture; expected one")


def random_adapter(page, folder: Path, **fields) -> Path:
    """Writes an adapter of the shipped base with random weights."""
    model = get_uc_model(AutoModelForImageTextToText.from_pretrained(BASE), small_config(**fields))
    model.save_pretrained(folder, processor=page.base.processor)
    return folder


@pytest.fixture(scope="module")
def other_adapter(page, tmp_path_factory):
    """An adapter of the shipped base at stride 4, with random weights."""
    return random_adapter(page, tmp_path_factory.mktemp("other"), stride=4)


def test_another_adapter_is_taken_by_folder_and_by_id(tab, other_adapter, hub):
    hub.create("org/other", {path.name: path.read_bytes() for path in other_adapter.iterdir()})
    tab.get_by_role("button", name="Adapter").click()
    for name in (str(other_adapter), "org/other"):
        tab.get_by_label("Hub id or folder").fill(name)
        tab.get_by_role("button", name="Load").click()
        told_of_it = tab.get_by_text("reads a picture in 9 tokens (base: 64) and draws one in 4 steps (base: 64)")
        expect(told_of_it).to_be_visible(timeout=PATIENCE)
    start(tab, PROMPTS[0])
    expect(tab.get_by_text("4 steps,", exact=False).last).to_be_visible(timeout=PATIENCE)
    tab.get_by_label("Hub id or folder").fill("org/none")
    tab.get_by_role("button", name="Load").click()
    told(tab, "org/none")


@pytest.fixture(scope="module")
def dial(page, tmp_path_factory):
    """An adapter of the shipped base for several ratios, with random weights."""
    return str(random_adapter(page, tmp_path_factory.mktemp("dial"), stride=[1, 2, 4], codes_per_step=[4, 8, 32]))


def test_the_ratios_of_an_adapter_are_chosen(tab, dial):
    tab.get_by_role("button", name="Adapter").click()
    expect(tab.get_by_label("Codes in a step")).to_be_hidden()  # the shipped one has none to choose
    tab.get_by_label("Hub id or folder").fill(dial)
    tab.get_by_role("button", name="Load").click()
    expect(tab.get_by_label("Codes in a step")).to_have_value("8", timeout=PATIENCE)
    expect(tab.get_by_label("Stride")).to_have_value("2")
    tab.get_by_label("Codes in a step").click()
    tab.get_by_role("option", name="32").click()
    start(tab, PROMPTS[0])
    expect(tab.get_by_text("2 steps,", exact=False).last).to_be_visible(timeout=PATIENCE)
    assert no_drawing_goes_on()


def test_a_question_is_read_at_the_stride_that_is_chosen(page, dial, images, tmp_path):
    images[0].save(tmp_path / "mine.png")
    (loaded, question), told = (page.adapter(dial), "How many digits are there?"), {}
    for stride in (1, 4):
        told[stride] = list(page.ask(str(tmp_path / "mine.png"), question, dial, stride))[-1][1].split("\n")[0]
        processor = loaded.model.compact_processor(page.base.processor, stride)
        assert told[stride] == answer(replace(loaded, processor=processor), [images[0]], [question], 64)[0]
    for ratio in ({"codes_per_step": 5}, {"codes_per_step": 0}):
        with pytest.raises(gr.Error, match=r"codes_per_step=.*4 or 8 or 32"):
            list(page.draw(PROMPTS[0], 0, dial, **ratio))
    with pytest.raises(gr.Error, match=r"stride=3.*1 or 2 or 4"):
        list(page.ask(str(tmp_path / "mine.png"), question, dial, 3))


@pytest.fixture
def phone(tab):
    desktop = tab.viewport_size
    tab.set_viewport_size({"width": 360, "height": 700})
    tab.reload()
    yield tab
    tab.set_viewport_size(desktop)


def test_the_page_fits_a_phone(phone):
    start(phone, PROMPTS[0])
    finish(phone)
    for name in ("Draw", "Ask"):
        phone.get_by_role("tab", name=name).click()
        assert phone.evaluate("document.documentElement.scrollWidth") <= 360
    phone.get_by_role("tab", name="Draw").click()
    left, right = (phone.locator(".picture").nth(index).bounding_box() for index in range(2))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]


def test_a_race_shows_every_step_and_ends_when_it_is_left(page):
    pair = [page.base, page.adapter(ADAPTER)]
    counts = [[d.steps for d in drawings] for drawings in race(pair, PROMPTS[0], 0, interval=0, **page.sampling)]
    assert counts[0] == [0, 0]
    assert counts[-1] == [64, 16]
    assert all(sum(after) - sum(before) <= 1 for before, after in pairwise(counts))
    left = race(pair, PROMPTS[0], 0, interval=0, **page.sampling)
    for _ in range(5):
        next(left)
    left.close()
    assert no_drawing_goes_on()
    with pytest.raises(InputError, match="top_beam"):  # what a drawing fails for is told
        list(race(pair[1:], PROMPTS[0], 0, top_beam=1))


def test_a_port_that_is_taken_is_told_in_one_line_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SystemExit, match=rf"--port {port}: Address already in use.*; expected a free port") as stop:
            app.main(Namespace(base="no/such", adapter="", device="cpu", temperature=1.0, guidance_scale=2.0, port=port))
    assert "\n" not in str(stop.value)


def test_a_space_holds_all_that_its_page_imports(tmp_path):
    space = tmp_path / "space"
    make_space.main(space)
    edges = graph(ROOT / "recipes", "")
    needed, found = ["demo.app"], set()
    while needed:
        module = needed.pop()
        found.add(module)
        needed += edges[module] - found
    assert {"demo.page", "scoring.contenders", "tiny_world.digits"} <= found
    assert [module for module in found if not (space / "recipes" / f"{module.replace('.', '/')}.py").is_file()] == []
    assert (space / app.PICTURES.relative_to(ROOT) / "scene-1.png").is_file()
    with pytest.raises(SystemExit, match="is there already"):
        make_space.main(space)


def test_a_space_asks_for_what_the_package_needs():
    project = (ROOT / "pyproject.toml").read_text()
    dependencies = re.search(r"\ndependencies = \[\n(.*?)\n\]", project, re.DOTALL)[1]
    assert set(re.findall(r'"(.+)"', dependencies)) <= set((ROOT / "recipes/demo/requirements.txt").read_text().splitlines())
    header = yaml.safe_load((ROOT / "recipes/demo/README.md").read_text().split("---")[1])
    assert f"gradio=={header['sdk_version']}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert (ROOT / header["app_file"]).is_file()
