"""An adapter on the tiny base as a repo folder, for every recipe that takes one; no test may change it."""

from dataclasses import replace

import pytest
from helpers import attach
from tiny_world.shapes import SHAPES
from transformers import AutoModelForImageTextToText

OF_THE_PACKAGE = (
    "test_distillation.py",
    "test_finetune.py",
    "test_finetune_options.py",
    "test_own_trainer.py",
    "test_training.py",
)


def pytest_itemcollected(item):
    """Coverage is of the package by its own tests, its trainers' among them; watching a recipe's takes half as long again."""
    if item.path.name not in OF_THE_PACKAGE:
        item.add_marker("no_cover")


def saved(base_folder, processor, folder, decompressor: str):
    attach(AutoModelForImageTextToText.from_pretrained(base_folder), decompressor=decompressor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=["strip", "phase"])
def adapter_folder(request, base_folder, short_processor, tmp_path_factory):
    return saved(base_folder, short_processor, tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def plain_folder(base_folder, short_processor, tmp_path_factory):
    """Where it does not matter how codes are decompressed."""
    return saved(base_folder, short_processor, tmp_path_factory.mktemp("adapter"), "strip")


@pytest.fixture
def small_batches(monkeypatch):
    """A base is pretrained on few images a step."""
    few = {"vq_rows": 8, "vision_rows": 4, "read_rows": 8, "draw_rows": 8, "kmeans_latents": 2**12}
    for name, shape in SHAPES.items():
        monkeypatch.setitem(SHAPES, name, replace(shape, **few))
