"""One load pulls once, parses the config once, and hashes the weights once."""

import json
from collections import Counter
from pathlib import Path

import pytest
from helpers import attach
from hub_helpers import ADAPTER, CONFIG, WEIGHTS
from peft import PeftModel

from uc_adapters import UniCompressModel
from uc_adapters.files import folder as files
from uc_adapters.files import pull


@pytest.fixture
def work(monkeypatch) -> Counter:
    """Counts what a load does; everything is done all the same."""
    counted = Counter()
    loads, hash_file, download = json.loads, files.sha.sha_fileobj, pull.snapshot_download

    def parse(*args, **kwargs):  # `json.load` comes by here
        content = loads(*args, **kwargs)
        counted["parsed the config"] += isinstance(content, dict) and "peft_type" in content
        return content

    def hash_counting(stream):
        counted["hashed the weights"] += Path(stream.name).name == WEIGHTS
        return hash_file(stream)

    def download_counting(*args, **kwargs):
        counted["pulled"] += 1
        return download(*args, **kwargs)

    monkeypatch.setattr(json, "loads", parse)
    monkeypatch.setattr(files.sha, "sha_fileobj", hash_counting)
    monkeypatch.setattr(pull, "snapshot_download", download_counting)
    return counted


ONCE = {"parsed the config": 1, "hashed the weights": 1}


def test_from_a_folder(adapter_folder, base, base_folder, work):
    assert {CONFIG, WEIGHTS} <= {path.name for path in adapter_folder.iterdir()}
    UniCompressModel.from_pretrained(base, adapter_folder)
    assert work == ONCE
    work.clear()
    UniCompressModel.from_pretrained(adapter_folder, base_model=base_folder)
    assert work == ONCE


@pytest.mark.parametrize("name", ["default", "second"])
def test_into_a_model(adapter_folder, base, work, name):
    attach(base).load_adapter(adapter_folder, name)
    assert work == ONCE


@pytest.mark.usefixtures("cache", "shelf")
def test_from_the_hub(base, work):
    model = UniCompressModel.from_pretrained(base, ADAPTER)
    assert work == {**ONCE, "pulled": 1}
    work.clear()
    model.load_adapter(ADAPTER, "second")
    assert work == {**ONCE, "pulled": 1}


def test_peft_reads_the_config_once_more_to_find_our_class(adapter_folder, base, work):
    PeftModel.from_pretrained(base, adapter_folder)
    assert work == {"parsed the config": 2, "hashed the weights": 1}
