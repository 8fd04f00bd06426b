"""The notebook runs from top to bottom on the tiny pair, with shorter trainings, and pushes to the Hub of the tests."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "adapter_from_nothing.ipynb"
CHANGED = {"REPO = None": 'REPO = "org/notebook"', "STEPS = 40": "STEPS = 2"}


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A working folder like a clone's root."""
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    monkeypatch.chdir(tmp_path)


def test_the_notebook_runs_from_top_to_bottom_and_pushes(clone, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_ann")
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(sum(line in cell for cell in code) == 1 for line in CHANGED)
    namespace = {}
    for cell in code:
        for line, changed in CHANGED.items():
            cell = cell.replace(line, changed)
        exec(compile(cell, str(NOTEBOOK), "exec"), namespace)
    assert namespace["of_adapter"].size == namespace["of_base"].size == (64, 64)
    assert namespace["again"].num_image_tokens == 21
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= hub.repos["org/notebook"].files().keys()


def test_the_notebook_is_committed_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
