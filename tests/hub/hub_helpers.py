"""What the tests of sharing have in common: ids, a folder's files, and runs in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from helpers import assert_same, logits
from peft.tuners.tuners_utils import BaseTunerLayer

BASE, ADAPTER = "org/base", "org/adapter"
BOB = "hf_bob"  # the token of a user who owns nothing of org
CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
HTML = b"<!DOCTYPE html><html><body>Please log in to the guest network.</body></html>"


def read_files(folder: Path) -> dict[str, bytes]:
    """A folder's files, by their path in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return folder


def sent(hub, method: str, part: str = "") -> list[str]:
    """The paths of the requests of one method that contain `part`."""
    return [path for verb, path in hub.requests if verb == method and part in path]


def patch_json(data: bytes, **fields) -> bytes:
    """A JSON file with other fields; the adapter's seal is kept, and so may be broken."""
    return json.dumps(json.loads(data) | fields).encode()


def assert_untouched(base, pristine, inputs) -> None:
    """A base carries nothing, has its own weights, and works."""
    assert not [name for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)]
    assert_same(base.state_dict(), pristine.state_dict())
    assert torch.equal(logits(base, inputs), logits(pristine, inputs))


def run_python(code: str, folder: Path, *arguments: str, **environment: str) -> str:
    """The output of code in a process of its own, in `folder`, with an empty cache there."""
    folder.mkdir(parents=True, exist_ok=True)
    threads = str(torch.get_num_threads())  # as many as here, else sums are of another order
    environment = os.environ | {"HF_HOME": str(folder / "hf-home"), "OMP_NUM_THREADS": threads} | environment
    command = [sys.executable, "-c", code, *arguments]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout
