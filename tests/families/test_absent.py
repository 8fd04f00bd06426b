"""A family of a newer transformers than the installed one: what needs it says so, and everything else works."""

import json
import re
from types import SimpleNamespace

import pytest
from peft.utils import CONFIG_NAME

from uc_adapters import UniCompressModel
from uc_adapters.command import main
from uc_adapters.errors import BaseModelError
from uc_adapters.families import ABSENT, FAMILIES, family_of

TOLD = r"type 'apertus1p5' needs a newer transformers than .*cannot import name 'Apertus1p5.*pip install -U transformers"


@pytest.fixture
def absent():
    if "apertus1p5" in FAMILIES:
        pytest.skip("the installed transformers has every family")
    assert list(ABSENT) == ["apertus1p5"]


def test_every_family_file_is_a_family_or_absent():
    assert not FAMILIES.keys() & ABSENT.keys()
    assert FAMILIES.keys() | ABSENT.keys() >= {"janus", "emu3", "chameleon", "apertus1p5"}


def test_a_base_of_an_absent_family_is_refused_with_what_it_needs(absent):
    with pytest.raises(BaseModelError, match=TOLD):
        family_of(SimpleNamespace(config=SimpleNamespace(model_type="apertus1p5")))


def test_an_adapter_of_an_absent_family_is_refused_before_its_base_is_looked_for(absent, shared, tmp_path, capsys):
    shared().save_pretrained(tmp_path)
    file = tmp_path / CONFIG_NAME
    fields = json.loads(file.read_text())
    file.write_text(
        json.dumps(fields | {"seal": None, "base_geometry": fields["base_geometry"] | {"model_type": "apertus1p5"}})
    )
    with pytest.raises(BaseModelError, match=TOLD):
        UniCompressModel.from_pretrained(tmp_path, base_model="org/nowhere")
    assert main(["info", str(tmp_path)]) == 1
    assert re.search(TOLD, capsys.readouterr().err)
