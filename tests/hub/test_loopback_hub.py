"""The loopback Hub answers the real client as a Hub does: what the other tests rely on."""

import hashlib
import subprocess
from pathlib import Path

import pytest
from helpers import ANN
from hub_helpers import BOB, sent
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

REPO = "ann/adapter"
WEIGHTS = bytes(range(256)) * 40
FILES = {"README.md": b"---\nlicense: mit\n---\n", "config.json": b'{"r": 2}', "model.safetensors": WEIGHTS, "sub/a.txt": b"a"}


@pytest.fixture
def repo(hub):
    hub.add_user("bob", BOB)
    return hub.create(REPO, FILES)


def test_push_and_pull(hub, cache):
    api = HfApi(token=ANN)
    api.create_repo(REPO)
    files = [CommitOperationAdd(path, content) for path, content in FILES.items()]
    first = api.create_commit(REPO, files, commit_message="First")
    assert hub.repos[REPO].branches == {"main": first.oid}
    assert len(sent(hub, "PUT")) == 1  # the weights only
    pulled = Path(snapshot_download(REPO, cache_dir=cache))
    assert {path: (pulled / path).read_bytes() for path in FILES} == FILES
    hub.requests.clear()
    assert snapshot_download(REPO, revision=first.oid, cache_dir=cache) == str(pulled)
    assert hub.requests == []


def test_checksums_are_those_of_git(repo):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n"
    pointer %= hashlib.sha256(WEIGHTS).hexdigest().encode(), len(WEIGHTS)
    entries = {entry.path: entry for entry in HfApi().list_repo_tree(REPO, recursive=True)}
    for path, content in {"config.json": FILES["config.json"], "model.safetensors": pointer}.items():
        told = subprocess.run(["git", "hash-object", "--stdin"], input=content, capture_output=True, check=True)
        assert entries[path].blob_id == told.stdout.decode().strip()
    assert entries["model.safetensors"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()


@pytest.mark.parametrize(
    ("state", "options", "error", "status"),
    [
        ({"private": True}, {"token": False}, RepositoryNotFoundError, 401),
        ({"private": True}, {"token": BOB}, RepositoryNotFoundError, 404),
        ({"gated": True}, {"token": False}, GatedRepoError, 401),
        ({"gated": True}, {"token": BOB}, GatedRepoError, 403),
        ({}, {"token": "hf_wrong"}, HfHubHTTPError, 401),
        ({}, {"revision": "gone"}, RevisionNotFoundError, 404),
    ],
)
def test_what_may_not_be_read(repo, cache, state, options, error, status):
    vars(repo).update(state)
    with pytest.raises(error) as caught:
        snapshot_download(REPO, cache_dir=cache, **options)
    assert type(caught.value) is error
    assert caught.value.response.status_code == status


def test_a_stale_parent_is_refused(repo):
    old, new = repo.branches["main"], repo.commit({"a.txt": "a"})
    add, api = [CommitOperationAdd("b.txt", b"b")], HfApi(token=ANN)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api.create_commit(REPO, add, commit_message="b", parent_commit=old)
    api.create_commit(REPO, add, commit_message="b", parent_commit=new)
    assert repo.files()["b.txt"] == b"b"


def test_the_client_resumes_what_was_cut_off_and_does_not_notice_damage(hub, repo, cache, impatient):
    hub.fail("lfs-storage.*safetensors", truncate=100, times=1)
    assert Path(hf_hub_download(REPO, "model.safetensors", cache_dir=cache)).read_bytes() == WEIGHTS
    assert len(sent(hub, "GET", "lfs-storage")) == 2
    hub.fail("config.json", corrupt=True)
    damaged = Path(hf_hub_download(REPO, "config.json", cache_dir=cache)).read_bytes()
    assert len(damaged) == len(FILES["config.json"])
    assert damaged != FILES["config.json"]


def test_the_storage_sees_no_token(hub, repo, cache, monkeypatch):
    """Its URLs are signed, and on another origin: a token sent there would be one leaked."""
    tokens, answer = [], hub.answer

    def spy(method, path, token, body):
        tokens.append(token)
        return answer(method, path, token, body)

    monkeypatch.setattr(hub, "answer", spy)
    hf_hub_download(REPO, "model.safetensors", cache_dir=cache, token=ANN)
    assert tokens == [ANN, None]
