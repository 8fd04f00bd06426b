"""Saving is whole or not at all: on a full disk, in a folder that cannot be written, killed at any moment, raced by others."""

import copy
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from helpers import attach, lora_weights
from peft.utils import CONFIG_NAME

from uc_adapters import CardFacts, UniCompressModel
from uc_adapters.errors import AdapterFileError

FORK = multiprocessing.get_context("fork")  # to import torch anew would cost seconds a process
FILE_EVENTS = ("open", "os.", "shutil.", "tempfile.")  # of Python's audit hooks: a save and a recovery raise some dozens
OTHER_USER = 65534  # "nobody"
under_both_names = pytest.mark.parametrize("name", ["default", "zap"])


def start(task, *args):
    """Runs a task in a process of its own, with one thread: torch's others do not survive the fork."""

    def run():
        torch.set_num_threads(1)
        task(*args)

    process = FORK.Process(target=run)
    process.start()
    return process


def outcome_of(task, *args) -> str:
    """What a task that may spoil its process returns, or the error that it raises, as text."""
    ours, theirs = FORK.Pipe()

    def report():
        try:
            theirs.send(str(task(*args)))
        except Exception as error:
            theirs.send(f"{type(error).__name__}: {error}")

    process = start(report)
    outcome = ours.recv()
    process.join()
    return outcome


def die_at(moment: int, task, *args) -> None:
    """Runs a task in this process, which is killed by SIGKILL just before the file operation of that number."""
    operations = count(1)

    def watch(event, _):
        if event.startswith(FILE_EVENTS) and next(operations) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    task(*args)
    os._exit(0)


def contents(folder) -> dict[str, bytes]:
    """All files but those of a save that was killed before it was complete."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if ".uc-adapters-saving-" not in str(path)}


def leftovers(folder) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


@pytest.fixture(scope="module")
def pair(pristine):
    """Two adapters that differ in their weights and in a field that no shape shows, under a name each."""
    return {
        name: [attach(copy.deepcopy(pristine), name, seed=seed, lora_alpha=seed) for seed in (3, 4)] for name in ("default", "zap")
    }


@pytest.fixture(scope="module")
def loads_as(pristine, pair):
    """Tells which of two adapters a folder loads as; fails where it is a mix of both."""
    base = copy.deepcopy(pristine)

    def which(folder, name: str = "default") -> int:
        model = UniCompressModel.from_pretrained(base, folder if name == "default" else folder / name, name)
        alpha, weights = model.peft_config[name].lora_alpha, lora_weights(model, name)
        model.unload()
        expected = lora_weights(pair[name][alpha - 3], name)
        assert [key for key in expected if not torch.equal(weights[key], expected[key])] == []
        return alpha - 3

    return which


def kill_a_save_at_every_moment(folder, save, check):
    """The exhaustive test: one process a file operation, killed just before it; ends with the save that none kills."""
    exits = []
    for moment in count(1):
        process = start(die_at, moment, save)
        process.join()
        exits.append(process.exitcode)
        check()
        if process.exitcode == 0:
            return moment
        assert process.exitcode == -signal.SIGKILL


@under_both_names
def test_a_save_killed_before_any_of_its_file_operations_leaves_the_old_or_the_new(tmp_path, pair, processor, loads_as, name):
    old, new = pair[name]
    folder, before = tmp_path / "adapter", tmp_path / "before"
    old.save_pretrained(folder, processor=processor)
    shutil.copytree(folder, before)
    whole_old = contents(folder)
    new.save_pretrained(folder, processor=processor)
    whole_new, found = contents(folder), []

    def check():
        index = loads_as(folder, name)  # finishes what was killed on its way into place
        assert contents(folder) == (whole_old, whole_new)[index]
        found.append(index)
        new.save_pretrained(folder, processor=processor)
        assert contents(folder) == whole_new
        assert leftovers(folder) == []
        shutil.rmtree(folder)
        shutil.copytree(before, folder)

    shutil.rmtree(folder)
    shutil.copytree(before, folder)
    kill_a_save_at_every_moment(folder, lambda: new.save_pretrained(folder, processor=processor), check)
    assert found == sorted(found)  # there is one moment at which the old becomes the new
    assert set(found) == {0, 1}
