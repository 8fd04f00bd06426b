"""What every file of figures needs: the machine, versions and date; a check of the device and of the output file."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "peft", "uc-adapters")


def environment(device: str = "cpu", further: Sequence[str] = ()) -> dict:
    """The "hardware" as text, the "versions" of PACKAGES and of `further` ones, and the "date" of a file of figures."""
    versions = {package: version(package) for package in (*PACKAGES, *further)}
    return {"hardware": hardware(device), "versions": versions, "date": date.today().isoformat()}


def hardware(device: str) -> str:
    """The GPU's name, or the number and model of the CPU cores."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line for line in lines if line.startswith("model name")), "")
    return f"{torch.get_num_threads()} CPU cores, {model.partition(': ')[2] or platform.processor() or platform.machine()}"


def check_output(option: str, file: str | None) -> None:
    """Exits, before hours of work, if the output file could not be written."""
    if file is not None and not Path(file).parent.is_dir():
        raise SystemExit(f"--{option} {file}: the folder {Path(file).parent} does not exist; make it first.")
    if file is not None and Path(file).is_dir():
        raise SystemExit(f"--{option} {file} is a folder; expected a file.")


def in_words(found: dict) -> str:
    """An `environment` as one line of text."""
    versions = ", ".join(f"{package} {number}" for package, number in found["versions"].items())
    return f"{found['hardware']}; {versions}; {found['date']}"


def check_device(device: str) -> None:
    """Exits if a device cannot be used."""
    if not is_here(device):
        raise SystemExit(f"--device {device!r}: expected cpu, or the device of a GPU that is there, such as cuda.")


def make_current(device: str) -> None:
    """Makes a GPU the current one, so that calls that synchronise or measure without a device use it."""
    if torch.device(device).index is not None:  # "cuda" alone is the current one already
        torch.cuda.set_device(device)


def is_here(device: str) -> bool:
    """Whether a device can be used: the CPU, or a GPU of this machine."""
    try:
        return torch.empty(0, device=device).device.type in ("cpu", "cuda")
    except (RuntimeError, AssertionError):  # PyTorch asserts that it was built for CUDA
        return False
