import re
import subprocess
import sys
from pathlib import Path

import peft.mapping
import pytest

import uc_adapters


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_public_names():
    assert {"UniCompressConfig", "UniCompressModel", "get_uc_model"} <= set(uc_adapters.__all__)
    assert all(hasattr(uc_adapters, name) for name in uc_adapters.__all__)


@pytest.mark.parametrize("mapping", ["CONFIG", "TUNER", "PREFIX"])
def test_the_method_is_registered_with_peft(mapping):
    assert "UNICOMPRESS" in [kind.value for kind in getattr(peft.mapping, f"PEFT_TYPE_TO_{mapping}_MAPPING")]


def test_importing_is_light_where_peft_is_loaded():
    """No other library comes with it, and no model's code: a family's is loaded with its base."""
    code = """
import sys, peft
before = set(sys.modules)
import uc_adapters
print(*sorted({name for name in set(sys.modules) - before if not name.startswith("uc_adapters")}))
"""
    loaded = run(code).split()
    assert {name.partition(".")[0] for name in loaded} <= {"transformers"}
    assert not any(".modeling_" in name for name in loaded)


def test_importing_warns_of_nothing_prints_nothing_and_opens_no_connection():
    code = """
import socket, warnings, peft
def refuse(*args, **kwargs):
    raise AssertionError("a connection was opened")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
warnings.simplefilter("error")
import uc_adapters
"""
    assert run(code) == ""


def test_importing_adds_one_method_to_peft_and_replaces_nothing():
    code = """
import peft, peft.mapping as m, transformers
tables = [m.PEFT_TYPE_TO_CONFIG_MAPPING, m.PEFT_TYPE_TO_TUNER_MAPPING, m.PEFT_TYPE_TO_PREFIX_MAPPING]
before = [dict(table) for table in tables]
classes = [peft.PeftModel, peft.tuners.lora.LoraModel, transformers.PreTrainedModel]
members = [dict(vars(c)) for c in classes]
import uc_adapters
for old, new in zip(before, tables):
    assert {k: v for k, v in new.items() if k in old} == old and len(new) == len(old) + 1
assert members == [dict(vars(c)) for c in classes]
"""
    run(code)


@pytest.mark.parametrize("library", ["transformers", "peft", "huggingface_hub"])
def test_the_layers_do_not_know_hugging_face(library):
    files = list(Path(uc_adapters.layers.__path__[0]).glob("*.py"))
    assert files
    assert [file.name for file in files if re.search(rf"^\s*(from|import) {library}", file.read_text(), re.MULTILINE)] == []
