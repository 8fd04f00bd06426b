"""A base and an adapter of it as the Hub holds them: made once, put on its shelf for every test that asks."""

import shutil
from types import SimpleNamespace

import pytest
from copies import copied
from helpers import ANN, attach, logits
from hub_helpers import ADAPTER, BASE, BOB, read_files
from loopback_hub import Commit

from uc_adapters import UniCompressModel
from uc_adapters.identity import remember_commit


@pytest.fixture(scope="session")
def base_files(base_folder) -> dict[str, bytes]:
    return read_files(base_folder)


@pytest.fixture(scope="session")
def base_commit(base_files) -> str:
    """The commit that `shelf` has of the base, in every test."""
    return Commit(None, "initial commit", base_files).sha


@pytest.fixture(scope="session")
def adapter_folder(pristine, processor, base_commit, tmp_path_factory):
    """An adapter as `save_pretrained` writes it, of the base on the shelf."""
    base = copied(pristine)
    base.name_or_path = BASE
    remember_commit(base, base_commit)
    folder = tmp_path_factory.mktemp("adapter")
    attach(base, seed=3).save_pretrained(folder, processor=processor)
    return folder


@pytest.fixture(scope="session")
def adapter_files(adapter_folder) -> dict[str, bytes]:
    return read_files(adapter_folder)


@pytest.fixture
def folder(adapter_folder, tmp_path):
    """A copy of the adapter's folder, to be changed."""
    return shutil.copytree(adapter_folder, tmp_path / "folder")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The Hub's cache, empty: commit ids repeat from test to test."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def stock(hub, base_files, adapter_files):
    """Puts all on the shelf, and mends what was broken: base and adapter; bob may read."""

    def put() -> None:
        hub.heal()
        hub.add_user("ann", ANN, "org")
        hub.add_user("bob", BOB)
        hub.create(BASE, base_files)
        repo = hub.create(ADAPTER, adapter_files | {f"stage2/{path}": data for path, data in adapter_files.items()})
        repo.branches["next"] = repo.tags["v1.0"] = repo.branches["main"]

    return put


@pytest.fixture
def shelf(hub, stock):
    """The Hub with base and adapter."""
    stock()
    return hub


@pytest.fixture
def impatient(monkeypatch):
    """The client sleeps between its retries, up to half a minute in all; which requests it sends stays the same."""
    for module in ("utils._http", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture(scope="session")
def expected(adapter_folder, pristine, short_question):
    """Logits of the adapter on the shelf, on its base."""
    return logits(UniCompressModel.from_pretrained(copied(pristine), adapter_folder), short_question)
