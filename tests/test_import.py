import re
import subprocess
import sys
from pathlib import Path

import peft.mapping
import pytest

import uc_adapters


def test_public_names():
    assert {"UniCompressConfig", "UniCompressModel", "get_uc_model"} <= set(uc_adapters.__all__)
    assert all(hasattr(uc_adapters, name) for name in uc_adapters.__all__)


@pytest.mark.parametrize("mapping", ["CONFIG", "TUNER", "PREFIX"])
def test_the_method_is_registered_with_peft(mapping):
    assert "UNICOMPRESS" in [kind.value for kind in getattr(peft.mapping, f"PEFT_TYPE_TO_{mapping}_MAPPING")]


def test_importing_is_light_silent_and_adds_one_method_to_peft():
    """In a process of its own, where peft is loaded: no other library comes with it, and no model's code, which is loaded with
    its base; it warns of nothing, prints nothing, opens no connection, and replaces nothing."""
    code = """
import socket, sys, warnings
import peft, peft.mapping as m, transformers
tables = [m.PEFT_TYPE_TO_CONFIG_MAPPING, m.PEFT_TYPE_TO_TUNER_MAPPING, m.PEFT_TYPE_TO_PREFIX_MAPPING]
before = [dict(table) for table in tables]
classes = [peft.PeftModel, peft.tuners.lora.LoraModel, transformers.PreTrainedModel]
members = [dict(vars(c)) for c in classes]
def refuse(*args, **kwargs):
    raise AssertionError("a connection was opened")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
warnings.simplefilter("error")
loaded = set(sys.modules)
print("imports")
import uc_adapters
print(*sorted({name for name in set(sys.modules) - loaded if not name.startswith("uc_adapters")}))
for old, new in zip(before, tables):
    assert {k: v for k, v in new.items() if k in old} == old and len(new) == len(old) + 1
assert members == [dict(vars(c)) for c in classes]
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    begun, loaded = result.stdout.removesuffix("\n").split("\n")
    assert begun == "imports"
    assert {name.partition(".")[0] for name in loaded.split()} <= {"transformers"}
    assert ".modeling_" not in loaded


@pytest.mark.parametrize("library", ["transformers", "peft", "huggingface_hub"])
def test_the_layers_do_not_know_hugging_face(library):
    files = list(Path(uc_adapters.layers.__path__[0]).glob("*.py"))
    assert files
    assert [file.name for file in files if re.search(rf"^\s*(from|import) {library}", file.read_text(), re.MULTILINE)] == []
