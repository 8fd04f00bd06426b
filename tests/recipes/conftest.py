"""An adapter on the tiny base as a repo folder, for every recipe that takes one; no test may change it."""

import pytest
from helpers import attach
from transformers import AutoModelForImageTextToText


@pytest.fixture(scope="session", params=["cell", "phase"])
def adapter_folder(request, base_folder, short_processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    base = AutoModelForImageTextToText.from_pretrained(base_folder)
    attach(base, decompressor=request.param).save_pretrained(folder)
    short_processor.save_pretrained(folder)
    return folder
