"""Saving is whole or not at all: on a full disk, in a folder that cannot be written, killed at any moment, raced by others."""

import copy
import multiprocessing
import os
import random
import re
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
from helpers import assert_same, attach, lora_weights
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from uc_adapters import CardFacts, UniCompressModel
from uc_adapters.errors import AdapterFileError, HubError
from uc_adapters.files.folder import locked

FORK = multiprocessing.get_context("fork")  # to import torch anew would cost seconds a process
FILE_EVENTS = ("open", "os.", "shutil.", "tempfile.")  # of Python's audit hooks: a save and a recovery raise some dozens
OTHER_USER = 65534  # "nobody"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
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
    """Two adapters that differ in their weights and in a field that no shape shows; the same pair under either name."""

    def make(name: str, alpha: int) -> UniCompressModel:
        small = {"lora_alpha": alpha, "decompressor_width": 16, "target_modules": ["q_proj"]}
        return attach(copy.deepcopy(pristine), name, seed=alpha, **small)

    return {name: [make(name, alpha) for alpha in (1, 2)] for name in ("default", "zap")}


@pytest.fixture(scope="module")
def loads_as(pristine, pair):
    """Tells which of the two a folder loads as; fails where it is a mix of both."""
    base = copy.deepcopy(pristine)

    def which(folder, name: str = "default") -> int:
        model = UniCompressModel.from_pretrained(base, folder if name == "default" else folder / name, name)
        index, weights = model.peft_config[name].lora_alpha - 1, lora_weights(model, name)
        model.unload()
        assert_same(weights, lora_weights(pair[name][index], name))
        return index

    return which


@under_both_names
def test_killed_before_any_of_its_file_operations_a_save_leaves_the_old_or_the_new(tmp_path, pair, processor, loads_as, name):
    (old, new), folder, original = pair[name], tmp_path / "adapter", tmp_path / "original"
    old.save_pretrained(folder, processor=processor)
    shutil.copytree(folder, original)
    new.save_pretrained(folder, processor=processor)
    whole, found = [contents(original), contents(folder)], []
    for moment in count(1):
        shutil.rmtree(folder)
        shutil.copytree(original, folder)
        process = start(die_at, moment, lambda: new.save_pretrained(folder, processor=processor))
        process.join()
        found.append(loads_as(folder, name))  # which finishes a save that was killed on its way into place
        assert contents(folder) == whole[found[-1]]
        new.save_pretrained(folder, processor=processor)
        assert contents(folder) == whole[1]
        assert leftovers(folder) == []
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert moment > 20  # the hook saw the file operations
    assert found == sorted(found)  # there is one moment at which the new takes the place of the old
    assert set(found) == {0, 1}


def test_killed_before_any_of_its_file_operations_a_first_save_leaves_nothing_or_all(tmp_path, pair, loads_as):
    _, new = pair["default"]
    found, errors = [], []
    for moment in count(1):
        folder = tmp_path / str(moment)
        process = start(die_at, moment, new.save_pretrained, folder)
        process.join()
        try:
            found.append(loads_as(folder))
        except (AdapterFileError, HubError) as error:
            errors.append(str(error))
            found.append(-1)
        if process.exitcode == 0:
            break
    assert all(re.search("is missing in|is no folder here", error) for error in errors)
    assert found == sorted(found)
    assert set(found) == {-1, 1}


def test_a_recovery_that_is_killed_over_and_over_is_finished_by_the_next(tmp_path, pair, processor, loads_as):
    old, new = pair["default"]
    old.save_pretrained(tmp_path, processor=processor)
    stage = tmp_path / ".uc-adapters-saved"  # as it stands while a save is on its way into place
    new.save_pretrained(stage, processor=processor)

    def recover():
        with locked(tmp_path):
            pass

    for moment in count(1):
        process = start(die_at, moment, recover)
        process.join()
        if process.exitcode == 0:
            break
    assert moment > 5
    assert loads_as(tmp_path) == 1
    assert leftovers(tmp_path) == []


def test_killed_at_any_time_a_save_leaves_the_old_or_the_new(tmp_path, pair, loads_as):
    """Unlike the kills above, these also fall into the middle of writing a file."""

    def save_in_turns():
        for turn in count():
            pair["default"][turn % 2].save_pretrained(tmp_path)

    pair["default"][0].save_pretrained(tmp_path)
    first = time.perf_counter()
    start(pair["default"][0].save_pretrained, tmp_path).join()
    one_save = time.perf_counter() - first  # of a machine that may be slow or busy: the kills must reach the second
    found, moments = [], random.Random(0)
    for _ in range(40):
        process = start(save_in_turns)
        time.sleep(moments.uniform(0, 4 * one_save))
        process.kill()
        process.join()
        found.append(loads_as(tmp_path))
    assert set(found) == {0, 1}
    pair["default"][1].save_pretrained(tmp_path)
    assert leftovers(tmp_path) == []


@under_both_names
def test_two_processes_save_into_one_folder_while_a_third_loads(tmp_path, pair, loads_as, name):
    enough = FORK.Event()

    def save_until_enough(model):
        while not enough.is_set():
            model.save_pretrained(tmp_path)
            time.sleep(0.05)  # who waits for the lock looks every 50 ms

    pair[name][0].save_pretrained(tmp_path)
    savers = [start(save_until_enough, model) for model in pair[name]]
    found = []
    try:
        while len(found) < 20 or (set(found) != {0, 1} and len(found) < 300):
            found.append(loads_as(tmp_path, name))
    finally:
        enough.set()
        for saver in savers:
            saver.join()
    assert [saver.exitcode for saver in savers] == [0, 0]
    assert set(found) == {0, 1}
    assert leftovers(tmp_path) == []


# Bytes that a file may grow to, and what then does not fit: the weights are written first, the card last
LIMITS = {"nothing fits": 0, "the header fits": 1_000, "half of the weights fit": 200_000, "the card does not fit": 1_000_000}


@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("before", ["an adapter", "nothing"])
def test_on_a_full_disk_nothing_changes(tmp_path, pair, before, limit):
    (old, new), folder = pair["default"], tmp_path / "adapter"
    if before == "an adapter":
        old.save_pretrained(folder)
    whole = contents(folder)

    def save():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # Python ignores SIGXFSZ: a write fails as on a full disk
        new.save_pretrained(folder, card=CardFacts(training={"notes": "n" * 2_000_000}))

    assert re.match(r"AdapterFileError: The adapter could not be saved to .*File too large.*as it was", outcome_of(save))
    assert contents(folder) == whole
    assert leftovers(folder) == []


def test_a_tokenizer_that_does_not_fit_is_told_too(tmp_path, pair, processor):
    """It is written by Rust, whose errors are neither OSErrors nor ours."""
    (old, new), folder, wordy = pair["default"], tmp_path / "adapter", copy.deepcopy(processor)
    wordy.tokenizer.add_tokens([f"word{number}" for number in range(20_000)])
    old.save_pretrained(folder, processor=processor)
    whole = contents(folder)

    def save():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        new.save_pretrained(folder, processor=wordy)

    assert re.match(r"AdapterFileError: The adapter could not be saved to .*File too large.*as it was", outcome_of(save))
    assert contents(folder) == whole
    assert leftovers(folder) == []


@pytest.mark.parametrize("path", ["file", "file/below", "file/far/below"])
def test_a_file_in_the_way_is_told(tmp_path, pair, path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AdapterFileError, match=rf"could not be saved to .*{path}.*expected a folder that can be written"):
        pair["default"][0].save_pretrained(tmp_path / path)
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_folder_in_the_place_of_a_file_is_told_and_nothing_changes(tmp_path, pair, loads_as):
    pair["default"][0].save_pretrained(tmp_path)
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").mkdir()
    whole = contents(tmp_path)
    with pytest.raises(AdapterFileError, match=r"could not be saved.*README\.md"):
        pair["default"][1].save_pretrained(tmp_path)
    assert contents(tmp_path) == whole
    assert loads_as(tmp_path) == 0


@pytest.fixture
def published():
    """A folder that everyone may read and no one may write, as of a cluster's shared models."""
    with tempfile.TemporaryDirectory() as directory:  # pytest's own folders are closed to other users
        Path(directory).chmod(0o755)
        yield Path(directory, "adapter")


def close(folder) -> None:
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)


def become_another() -> None:
    if os.geteuid() == 0:  # root may write everywhere
        os.setuid(OTHER_USER)


def test_a_folder_that_may_not_be_written_is_told_and_loads(published, pair, loads_as):
    (old, new), folder = pair["default"], published
    old.save_pretrained(folder)
    close(folder)
    whole = contents(folder)

    def save():
        become_another()
        new.save_pretrained(folder)

    def load():
        become_another()
        return loads_as(folder)

    assert outcome_of(load) == "0"
    assert re.match("AdapterFileError: The adapter could not be saved.*Permission denied", outcome_of(save))
    assert contents(folder) == whole
    assert leftovers(folder) == []


@as_root
@pytest.mark.parametrize("name", [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME])
def test_a_file_that_may_not_be_read_is_told(published, pair, loads_as, name):
    pair["default"][0].save_pretrained(published)
    close(published)
    (published / name).chmod(0o400)

    def load():
        become_another()
        return loads_as(published)

    assert re.match(f"AdapterFileError: .*{name}.*(Permission denied|cannot be read)", outcome_of(load))


@as_root
def test_a_user_without_a_name_saves_and_loads(published, pair, loads_as, monkeypatch):
    """As in a container that was given a number alone."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    published.parent.chmod(0o777)

    def save_and_load():
        os.setuid(54_321)
        pair["default"][1].save_pretrained(published)
        return loads_as(published)

    assert outcome_of(save_and_load) == "1"
