"""Pulling what is there: which commit, which base, how many requests; and what is told where base, token or cache fail."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ANN, CAPTIONS, SHORT, attach, draw, drawing_inputs, logits, lora_weights
from hub_helpers import (
    ADAPTER,
    BASE,
    CONFIG,
    HTML,
    WEIGHTS,
    assert_untouched,
    patch_json,
    read_files,
    sent,
)
from transformers import AutoProcessor

from uc_adapters import UniCompressModel
from uc_adapters.errors import AdapterFileError, BaseModelError, HubError

OTHER = "org/other"


@pytest.fixture
def other_files(fresh, base_commit, processor, tmp_path) -> dict[str, bytes]:
    """An adapter with other weights than the one on the shelf, of another shape."""
    base = fresh()
    base.name_or_path = BASE
    attach(base, seed=11, stride=4, num_global_tokens=1, r=4).save_pretrained(tmp_path / "other", processor=processor)
    return read_files(tmp_path / "other")


@pytest.fixture
def loaded(fresh):
    """Tells adapters apart by the sum of their weights."""

    def of(source, **options) -> float:
        model = UniCompressModel.from_pretrained(fresh(), source, **options)
        return sum(weight.double().sum().item() for weight in lora_weights(model).values())

    return of


# --- which commit of the adapter


@pytest.mark.usefixtures("cache")
def test_a_revision_is_a_branch_a_tag_or_a_commit(shelf, loaded, other_files):
    repo = shelf.repos[ADAPTER]
    first = loaded(ADAPTER)
    old, new = repo.branches["main"], repo.commit(other_files)
    repo.branches |= {"try/2": new, "main": old}
    repo.tags["v2"] = new
    (other,) = {loaded(ADAPTER, revision=revision) for revision in ("try/2", "v2", new[:7])}
    assert other != first == loaded(ADAPTER, revision="main")


@pytest.mark.usefixtures("cache")
def test_main_moves_on(shelf, loaded, adapter_folder, other_files):
    first = loaded(ADAPTER)
    shelf.repos[ADAPTER].commit(other_files)
    assert loaded(ADAPTER) != first == loaded(adapter_folder)


@pytest.mark.usefixtures("cache")
def test_a_subfolder(shelf, loaded, adapter_folder, other_files):
    shelf.create(OTHER, {f"stage2/best/{path}": data for path, data in other_files.items()})
    expected = loaded(adapter_folder)
    assert loaded(OTHER, subfolder="stage2/best") != expected
    assert loaded(ADAPTER, subfolder="stage2") == expected
    shelf.requests.clear()
    assert loaded(ADAPTER, subfolder="stage2") == expected
    assert not sent(shelf, "GET", "/resolve/")  # and no file of another folder


@pytest.mark.usefixtures("cache")
def test_a_private_repo_of_a_private_base(shelf, short_question, expected):
    for repo in shelf.repos.values():
        repo.private = True
    model = UniCompressModel.from_pretrained(ADAPTER, token=ANN)
    assert torch.equal(logits(model, short_question), expected)
    model.load_adapter(ADAPTER, "again", token=ANN)


# --- requests and the cache


@pytest.mark.usefixtures("cache")
def test_a_second_load_asks_once_and_a_local_one_never(shelf, base, fresh):
    UniCompressModel.from_pretrained(base, ADAPTER)
    assert not sent(shelf, "GET", "README")
    shelf.requests.clear()
    UniCompressModel.from_pretrained(fresh(), ADAPTER)
    assert shelf.requests == [("GET", f"/api/models/{ADAPTER}/revision/main")]
    shelf.requests.clear()
    UniCompressModel.from_pretrained(fresh(), ADAPTER, local_files_only=True)
    UniCompressModel.from_pretrained(fresh(), ADAPTER, revision=shelf.repos[ADAPTER].branches["main"])
    assert shelf.requests == []


@pytest.mark.usefixtures("cache")
def test_force_download_fetches_again(shelf, base, fresh):
    UniCompressModel.from_pretrained(base, ADAPTER)
    shelf.requests.clear()
    UniCompressModel.from_pretrained(fresh(), ADAPTER, force_download=True)
    assert len(sent(shelf, "GET", "lfs-storage")) == 1


def test_cache_dir_holds_base_and_adapter_and_the_default_cache_nothing(shelf, cache, tmp_path):
    mine = tmp_path / "mine"
    UniCompressModel.from_pretrained(ADAPTER, cache_dir=mine)
    assert {path.name for path in mine.glob("models--*")} == {"models--org--adapter", "models--org--base"}
    assert not cache.exists()
    shelf.requests.clear()
    model = UniCompressModel.from_pretrained(ADAPTER, cache_dir=mine, local_files_only=True)
    model.load_adapter(ADAPTER, "again", cache_dir=mine, local_files_only=True)
    assert shelf.requests == []


def test_no_file_of_the_repo_but_the_adapters_own_is_fetched(shelf, cache, base):
    shelf.repos[ADAPTER].commit({"optimizer.pt": b"big", "adapter_model.bin": b"pickle", "code.py": b"import os"})
    UniCompressModel.from_pretrained(base, ADAPTER)
    snapshot = next(cache.glob("models--org--adapter/snapshots/*"))
    assert not {path.name for path in snapshot.rglob("*")} & {"optimizer.pt", "adapter_model.bin", "code.py", "stage2"}


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "tokenizer.json"])
def test_a_file_damaged_in_the_cache_is_found_and_fetched_again(shelf, cache, base, pristine, dense_question, fresh, name):
    UniCompressModel.from_pretrained(fresh(), ADAPTER)
    blob = next(cache.glob(f"models--org--adapter/snapshots/*/{name}")).resolve()
    whole = blob.read_bytes()
    blob.write_bytes(whole[:-5] + b"?" + whole[-4:])
    with pytest.raises(
        AdapterFileError, match=f"{re.escape(name)} was damaged .* or in the cache.*copy is removed: load again"
    ):
        UniCompressModel.from_pretrained(base, ADAPTER, local_files_only=True)
    assert_untouched(base, pristine, dense_question)
    assert not blob.exists()
    with pytest.raises(HubError, match="local_files_only=True, and 'org/adapter' is not whole in the cache"):
        UniCompressModel.from_pretrained(base, ADAPTER, local_files_only=True)
    UniCompressModel.from_pretrained(base, ADAPTER)
    assert blob.read_bytes() == whole


# --- the base


def test_the_base_is_loaded_at_the_recorded_commit(shelf, cache, base_commit, base_files, recwarn):
    shelf.repos[BASE].commit({"config.json": patch_json(base_files["config.json"], model_type="llama")})
    model = UniCompressModel.from_pretrained(ADAPTER)
    assert type(model.get_base_model()).__name__ == "JanusForConditionalGeneration"
    assert [path.name for path in cache.glob("models--org--base/snapshots/*")] == [base_commit]
    assert not [warning for warning in recwarn if "trained on" in str(warning.message)]


@pytest.mark.usefixtures("cache")
def test_a_base_that_moved_on_and_is_given_by_hand_is_warned_of(shelf, base_commit):
    moved = shelf.repos[BASE].commit({"README.md": "new"})
    told = rf"trained on org/base@{base_commit[:8]}, got org/base@{moved[:8]}: .* the commit differs"
    with pytest.warns(UserWarning, match=told):
        model = UniCompressModel.from_pretrained(ADAPTER, base_model=BASE)
    with pytest.warns(UserWarning, match=told):
        model.load_adapter(ADAPTER, "again")


@pytest.mark.usefixtures("cache")
def test_a_base_from_a_folder(shelf, base_folder, short_question, expected):
    model = UniCompressModel.from_pretrained(ADAPTER, base_model=base_folder)
    assert torch.equal(logits(model, short_question), expected)
    assert not sent(shelf, "GET", BASE)


NEEDS = r"Adapter 'org/adapter' needs base org/base@[0-9a-f]{8}, which could not be loaded\. "
REMEDY = r".* Or pass base_model= with its folder, its id or the loaded model\."
BASES = {
    "missing": (lambda hub: hub.repos.pop(BASE), "There is no repo 'org/base', or it is private and you may not see it"),
    "private": (lambda hub: vars(hub.repos[BASE]).update(private=True), r"or it is private .*\(no token was sent\)"),
    "gated": (
        lambda hub: vars(hub.repos[BASE]).update(gated=True),
        r"'org/base' is gated: ask for access at http://\S+/org/base",
    ),
    "without the commit": (
        lambda hub: hub.create(BASE, {"config.json": "{}"}),
        r"'org/base' exists, but has no revision '[0-9a-f]{40}'; branches: main; tags: none",
    ),
    "down": (lambda hub: hub.fail(f"{BASE}/resolve", status=503), r"The Hub is unavailable \(status 503\)"),
    "cut off": (lambda hub: hub.fail("lfs-storage.*=model.safetensors", truncate=99), "'org/base' was cut off"),
    "a proxy's page": (lambda hub: hub.fail(f"{BASE}/resolve", status=200, body=HTML), "is not the Hub"),
}


@pytest.mark.usefixtures("cache", "impatient")
@pytest.mark.parametrize(("spoil", "match"), BASES.values(), ids=BASES.keys())
def test_a_base_that_cannot_be_loaded(shelf, stock, spoil, match, short_question, expected):
    spoil(shelf)
    with pytest.raises(BaseModelError, match=NEEDS + ".*" + match + REMEDY):
        UniCompressModel.from_pretrained(ADAPTER)
    stock()
    assert torch.equal(logits(UniCompressModel.from_pretrained(ADAPTER), short_question), expected)


@pytest.mark.usefixtures("cache")
def test_a_base_given_by_an_id_that_is_wrong(shelf):
    with pytest.raises(BaseModelError, match=r"'org/adapter' needs base org/gone@unknown.*There is no repo 'org/gone'"):
        UniCompressModel.from_pretrained(ADAPTER, base_model="org/gone")


@pytest.mark.usefixtures("cache")
def test_local_files_only_with_the_adapter_in_the_cache_but_not_its_base(shelf, base, base_commit):
    UniCompressModel.from_pretrained(base, ADAPTER)
    shelf.requests.clear()
    command = f"local_files_only=True, and 'org/base' is not whole.*hf download org/base --revision {base_commit}"
    with pytest.raises(BaseModelError, match=NEEDS + command):
        UniCompressModel.from_pretrained(ADAPTER, local_files_only=True)
    assert shelf.requests == []


# --- several at once


@pytest.mark.usefixtures("cache")
def test_adapters_of_several_repos_switch_in_place(shelf, other_files, fresh, short_processor):
    shelf.create(OTHER, other_files)
    prompts = drawing_inputs(short_processor, CAPTIONS[:1])
    alone = {
        name: draw(UniCompressModel.from_pretrained(fresh(), source), prompts)
        for name, source in (("default", ADAPTER), ("other", OTHER))
    }
    model = UniCompressModel.from_pretrained(fresh(), ADAPTER)
    model.load_adapter(OTHER, "other")
    for name in ("other", "default", "other"):
        model.set_adapter(name)
        assert torch.equal(draw(model, prompts), alone[name])
    assert not torch.equal(*alone.values())


# --- tokens, and being offline


def by_environment(monkeypatch, tmp_path) -> str:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    return "the token in the environment variable HF_TOKEN"


def by_old_environment(monkeypatch, tmp_path) -> str:
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_wrong")
    return "the token in the environment variable HUGGING_FACE_HUB_TOKEN"


def by_file(monkeypatch, tmp_path) -> str:
    (tmp_path / "token").write_text("hf_wrong\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    return f"the token in {tmp_path / 'token'}"


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("put", "private"),
    [(by_environment, False), (by_old_environment, False), (by_file, False), (by_file, True)],
    ids=["environment", "old environment", "file", "private"],
)
def test_a_bad_token_is_told_with_where_it_came_from(shelf, base, monkeypatch, tmp_path, put, private):
    shelf.repos[ADAPTER].private = private
    source = put(monkeypatch, tmp_path)
    with pytest.raises(HubError, match=f"refused the token as invalid: {re.escape(source)}\\. Make another"):
        UniCompressModel.from_pretrained(base, ADAPTER)
    shelf.add_user("carl", "hf_wrong", "org")
    UniCompressModel.from_pretrained(base, ADAPTER)


@pytest.mark.parametrize(
    ("how", "options", "command"),
    [
        ("offline", {}, "hf download org/adapter"),
        ("offline", {"cache_dir": "my cache"}, "hf download org/adapter --cache-dir 'my cache'"),
        ("local_files_only", {"revision": "v1.0"}, "hf download org/adapter --revision v1.0"),
    ],
    ids=["main", "a cache of its own", "a tag"],
)
def test_the_download_command_is_the_one_that_helps(shelf, cache, base, monkeypatch, tmp_path, how, options, command):
    """Copied from the message and run, it lets the same call succeed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", how == "offline")
    if how == "local_files_only":
        options = options | {"local_files_only": True}
    told = {"local_files_only": "local_files_only=True, and", "offline": r"Offline mode is on \(HF_HUB_OFFLINE\), and"}[how]
    with pytest.raises(HubError, match=f"{told} 'org/adapter' is not whole in the cache.*{re.escape(command)}") as caught:
        UniCompressModel.from_pretrained(base, ADAPTER, **options)
    assert shelf.requests == []
    program, *arguments = shlex.split(re.search(r"hf download [^`]*", str(caught.value))[0])
    environment = os.environ | {"HF_HUB_CACHE": str(cache)}
    subprocess.run([Path(sys.executable).with_name(program), *arguments], env=environment, check=True, timeout=60)
    shelf.requests.clear()
    UniCompressModel.from_pretrained(base, ADAPTER, **options)
    assert shelf.requests == []


def test_local_files_only_sends_nothing(shelf, cache):
    UniCompressModel.from_pretrained(ADAPTER)  # brings the adapter's processor along
    AutoProcessor.from_pretrained(BASE)
    shelf.requests.clear()
    model = UniCompressModel.from_pretrained(ADAPTER, local_files_only=True)
    model.load_adapter(ADAPTER, "again", local_files_only=True)
    assert AutoProcessor.from_pretrained(ADAPTER, local_files_only=True).num_image_tokens == SHORT
    assert AutoProcessor.from_pretrained(BASE, local_files_only=True).num_image_tokens == 64
    assert shelf.requests == []


def test_offline_nothing_is_sent(shelf, cache, monkeypatch):
    """HF_HUB_OFFLINE is read once, on import; here it is set later, which saves a process that imports everything anew."""
    UniCompressModel.from_pretrained(ADAPTER)
    AutoProcessor.from_pretrained(BASE)
    shelf.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"(?s)'org/never-here' is not whole in the cache.*hf download org/never-here"):
        UniCompressModel.from_pretrained("org/never-here")
    model = UniCompressModel.from_pretrained(ADAPTER)
    model.load_adapter(ADAPTER, "again")
    assert AutoProcessor.from_pretrained(ADAPTER).num_image_tokens == SHORT
    assert AutoProcessor.from_pretrained(BASE).num_image_tokens == 64
    assert shelf.requests == []
