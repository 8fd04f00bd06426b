"""A failed save changes nothing; a killed one leaves a folder that loads, or that the seal refuses until it is saved again."""

import copy
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
from itertools import count
from pathlib import Path

import pytest
from copies import copied
from helpers import assert_same, attach, lora_weights
from other_processes import FORK, start
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from uc_adapters import CardFacts, UniCompressConfig, UniCompressModel
from uc_adapters.errors import AdapterFileError, HubError
from uc_adapters.hub import model as hub_model

FILE_EVENTS = ("open", "os.", "shutil.", "tempfile.")  # of Python's audit hooks: a save raises some dozens
OTHER_USER = 65534  # "nobody"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


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
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leftovers(folder) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


@pytest.fixture(scope="module")
def pair(pristine) -> list[UniCompressModel]:
    """Two adapters that differ in their weights and in a field that no shape shows."""

    def make(alpha: int) -> UniCompressModel:
        small = {"lora_alpha": alpha, "decompressor_width": 16, "target_modules": ["q_proj"]}
        return attach(copied(pristine), seed=alpha, **small)

    return [make(1), make(2)]


@pytest.fixture(scope="module")
def loads_as(pristine, pair):
    """Tells which of the two a folder loads as, or that it is refused; fails if it loads as a mix of both."""
    base = copied(pristine)

    def which(folder) -> str:
        try:
            model = UniCompressModel.from_pretrained(base, folder)
        except (AdapterFileError, HubError):
            return "refused"
        index, weights = model.peft_config["default"].lora_alpha - 1, lora_weights(model)
        model.unload()
        assert_same(weights, lora_weights(pair[index]))
        return ["old", "new"][index]

    return which


@pytest.mark.parametrize(("before", "step"), [("an adapter", 2), ("nothing", 5)])
def test_killed_between_its_file_operations_a_save_is_noticed_and_done_again(tmp_path, pair, processor, loads_as, before, step):
    (old, new), original, again = pair, tmp_path / "original", tmp_path / "again"
    if before == "an adapter":
        old.save_pretrained(original, processor=processor)
    found, seen = [], []
    for moment in count(1, step):
        folder = tmp_path / str(moment) / "adapter"  # one name, since the card holds it
        if original.exists():
            shutil.copytree(original, folder)
        process = start(die_at, moment, lambda to=folder: new.save_pretrained(to, processor=processor))
        process.join()
        left = {path: data for path, data in contents(folder).items() if not path.startswith(".")}
        changed = left not in seen  # by most operations it is not, and loads as before
        if changed:
            seen.append(left)
            found.append(loads_as(folder))
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        if changed and found[-1] != "old":
            new.save_pretrained(folder, processor=processor)
            assert loads_as(folder) == "new"
            assert leftovers(folder) == []
    new.save_pretrained(again / "adapter", processor=processor)
    assert contents(folder).keys() == contents(again / "adapter").keys()
    assert moment > 20  # the hook saw the file operations
    stages = ["old", "refused", "new"] if before == "an adapter" else ["refused", "new"]
    assert sorted(found, key=stages.index) == found
    assert set(found) == set(stages)


def test_a_save_during_a_load_is_told(tmp_path, pair, base, monkeypatch):
    """The new weights were not checked, and have another config."""
    old, new = pair

    def meanwhile(*args):
        new.save_pretrained(tmp_path / "adapter")
        return base

    old.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(hub_model, "load_base", meanwhile)
    with pytest.raises(AdapterFileError, match=r"Another process saved into .*adapter while it was loaded.*Load it again"):
        UniCompressModel.from_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(hub_model, "load_base", lambda *args: base)
    assert UniCompressModel.from_pretrained(tmp_path / "adapter").peft_config["default"].lora_alpha == 2


# Bytes that a file may grow to, and what then does not fit: the weights are written first, the card last
LIMITS = {"nothing fits": 0, "the header fits": 1_000, "half of the weights fit": 200_000, "the card does not fit": 550_000}


@pytest.mark.parametrize(
    ("before", "limit"),
    [*(("an adapter", limit) for limit in LIMITS.values()), ("nothing", LIMITS["half of the weights fit"])],
    ids=[*LIMITS, "half of a first save fits"],
)
def test_on_a_full_disk_nothing_changes(tmp_path, pair, before, limit):
    (old, new), folder = pair, tmp_path / "adapter"
    if before == "an adapter":
        old.save_pretrained(folder)
    whole = contents(folder)

    def save():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # Python ignores SIGXFSZ: a write fails as on a full disk
        new.save_pretrained(folder, card=CardFacts(training={"notes": "n" * 600_000}))

    assert re.match(r"AdapterFileError: The adapter could not be saved to .*File too large.*as it was", outcome_of(save))
    assert contents(folder) == whole
    assert leftovers(folder) == []


def test_a_tokenizer_that_does_not_fit_is_told_too(tmp_path, pair, processor):
    """It is written by Rust, whose errors are neither OSErrors nor ours."""
    (old, new), folder, wordy = pair, tmp_path / "adapter", copy.deepcopy(processor)
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
        pair[0].save_pretrained(tmp_path / path)
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_folder_in_the_place_of_a_file_is_told_and_nothing_changes(tmp_path, pair, loads_as):
    pair[0].save_pretrained(tmp_path)
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").mkdir()
    whole = contents(tmp_path)
    with pytest.raises(AdapterFileError, match=r"could not be saved.*README\.md"):
        pair[1].save_pretrained(tmp_path)
    assert contents(tmp_path) == whole
    assert loads_as(tmp_path) == "old"


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
    (old, new), folder = pair, published
    old.save_pretrained(folder)
    close(folder)
    whole = contents(folder)

    def save():
        become_another()
        new.save_pretrained(folder)

    def load():
        become_another()
        return loads_as(folder)

    assert outcome_of(load) == "old"
    assert re.match("AdapterFileError: The adapter could not be saved.*Permission denied", outcome_of(save))
    assert contents(folder) == whole
    assert leftovers(folder) == []


@as_root
@pytest.mark.parametrize("name", [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME])
def test_a_file_that_may_not_be_read_is_told(published, pair, name):
    pair[0].save_pretrained(published)
    close(published)
    (published / name).chmod(0o400)

    def load():
        become_another()
        UniCompressConfig.from_pretrained(published)

    assert re.match(f"AdapterFileError: .*{name}.*(Permission denied|cannot be read)", outcome_of(load))


@as_root
def test_a_user_without_a_name_saves_and_loads(published, pair, loads_as, monkeypatch):
    """As in a container that was given a number alone."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    published.parent.chmod(0o777)

    def save_and_load():
        os.setuid(54_321)
        pair[1].save_pretrained(published)
        return loads_as(published)

    assert outcome_of(save_and_load) == "new"
