"""The README's Python snippets run as pasted, one after another; its links lead somewhere, and it stays short."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import published_janus
import pytest
import torch
from helpers import ANN
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from uc_adapters import UniCompressConfig, UniCompressModel, get_uc_model

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
BASE, ADAPTER, SECOND = "deepseek-community/Janus-Pro-1B", "your-org/janus-pro-1b-uc4x", "your-org/janus-pro-1b-sketches"


@pytest.fixture
def published(hub, tmp_path, monkeypatch):
    """A Hub with a thin Janus-Pro under the id of the real one, and a second adapter; the one who is logged in may write."""
    hub.add_user("ann", ANN, "your-org")
    folder = published_janus.write(tmp_path / "published")
    hub.create(BASE, {path.name: path.read_bytes() for path in folder.iterdir()})
    monkeypatch.setenv("HF_TOKEN", ANN)
    base = AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.bfloat16)
    config = UniCompressConfig(r=2, decompressor_width=32, decompressor_layers=1)
    get_uc_model(base, config).push_to_hub(SECOND, processor=AutoProcessor.from_pretrained(BASE))
    return hub


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder in which the README's relative paths are right, and what a snippet writes does no harm."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("model_cards", "docs"):
        (folder / name).symlink_to(ROOT / name)
    monkeypatch.chdir(folder)
    return folder


def test_the_snippets_run_as_pasted(published, repository):
    names: dict = {}
    told = io.StringIO()
    with redirect_stdout(told):
        for snippet in SNIPPETS:
            exec(compile(snippet, "README.md", "exec"), names)
    assert Image.open(repository / "drawing.png").size == (64, 64)
    assert re.search(r"^[a-z ]+, [a-z]+ style\n", told.getvalue())  # what was drawn is read: a thing and a style
    saved = AutoProcessor.from_pretrained(repository / "janus-pro-1b-uc4x")
    assert saved.num_image_tokens == names["processor"].num_image_tokens == 149
    model = names["model"]
    assert isinstance(model, UniCompressModel)
    assert model.active_adapter == "sketches"
    assert set(model.peft_config) == {"default", "sketches"}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= published.repos[ADAPTER].files().keys()


def test_the_first_snippet_is_about_the_shipped_pair():
    assert "model_cards/emoji-janus-uc4x" in SNIPPETS[0]
    assert 'base_model="model_cards/emoji-janus"' in SNIPPETS[0]


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_what_it_links_to_is_there():
    targets = re.findall(r"\]\(([^)]+)\)", README)
    paths = [target.partition("#")[0] for target in targets if "://" not in target]
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_it_says_what_was_not_run():
    assert "No published checkpoint was run" in README
    assert "measured with random weights, on one H100 and on two CPU cores" in README
