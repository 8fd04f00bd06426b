"""Pulling: what arrives is whole and right, or the user is told why not, nothing stays behind, and the next try succeeds."""

import json
import re
from dataclasses import dataclass, field

import pytest
import torch
from helpers import ANN, CAPTIONS, attach, base_weights, draw, drawing_inputs, logits, lora_weights
from hub_helpers import ADAPTER, BASE, BOB, CONFIG, HTML, WEIGHTS, assert_untouched, patch_json, read_files, sent
from loopback_hub import sha256
from peft import PeftModel
from transformers import AutoProcessor

from uc_adapters import UniCompressModel
from uc_adapters.errors import AdapterFileError, BaseModelError, ConfigError, HubError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 3012345\n"


@pytest.fixture
def expected(adapter_folder, fresh, short_question):
    """Logits of the adapter on the shelf."""
    return logits(UniCompressModel.from_pretrained(fresh(), adapter_folder), short_question)


def nothing(hub) -> None:
    pass


@dataclass
class Row:
    """A way to fail: how the Hub is spoilt and mended, the options of the call, and what the user is told."""

    error: type[Exception]
    match: str
    spoil: object = nothing
    mend: object = None  # default: as `shelf` makes it
    options: dict = field(default_factory=dict)


def fail(pattern: str, **fault):
    return lambda hub: hub.fail(pattern, **fault)


def commit(*, delete=(), **files):
    """Files of the adapter's repo replaced, each by what a function makes of it."""
    names = {"config": CONFIG, "weights": WEIGHTS, "evil": "../evil", "root": "/etc/evil", "drive": "C:/evil"}
    names |= {"backslash": "..\\evil", "inner": "a/../../evil", "pickle": "adapter_model.bin", "sub": f"stage2/{CONFIG}"}

    def spoil(hub):
        repo = hub.repos[ADAPTER]
        held = repo.files()
        repo.commit({names[name]: make(held.get(names[name])) for name, make in files.items()}, delete=delete)

    return spoil


def flip(data: bytes) -> bytes:
    """One bit in the last tensor."""
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


def configure(**fields):
    """The config with other fields, as someone would commit who knows nothing of seals."""
    return commit(config=lambda data: patch_json(data, **fields))


def reshaped(data: bytes) -> bytes:
    geometry = json.loads(data)["base_geometry"]
    return patch_json(data, base_geometry=geometry | {"num_layers": 24})
