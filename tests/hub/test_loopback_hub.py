"""The loopback Hub behaves as the real client expects a Hub to."""

import hashlib
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from helpers import ANN
from hub_helpers import BOB, sent
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from loopback_hub import LoopbackHub, blob_oid, start_for_session

REPO = "ann/adapter"
CARD = "---\nlibrary_name: uc-adapters\nbase_model: org/base\ntags:\n- janus\n- base_model:adapter:org/base\n---\n# Card\n"
WEIGHTS = bytes(range(256)) * 40
FILES = {"README.md": CARD, "config.json": '{"r": 2}', "model.safetensors": WEIGHTS, "sub/notes.txt": "a note"}


@pytest.fixture
def hub(hub):
    hub.add_user("bob", BOB)
    return hub


@pytest.fixture
def api():
    return HfApi(token=ANN)


@pytest.fixture
def folder(tmp_path):
    """The files on disk."""
    for path, content in FILES.items():
        file = tmp_path / "folder" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return tmp_path / "folder"


def contents(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


def as_bytes(files) -> dict[str, bytes]:
    return {path: data.encode() if isinstance(data, str) else data for path, data in files.items()}


def test_push_and_pull(hub, api, folder, cache):
    url = api.create_repo(REPO)
    assert url.repo_id == REPO
    info = api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="First")
    repo = hub.repos[REPO]
    assert repo.branches == {"main": info.oid}
    assert repo.commits[info.oid].message == "First"
    assert repo.files().keys() == {".gitattributes", *FILES}
    assert len(sent(hub, "PUT")) == 1  # the weights only
    pulled = contents(snapshot_download(REPO, cache_dir=cache))
    pulled.pop(".gitattributes")
    assert pulled == contents(folder)


def test_a_second_push_sends_nothing(hub, api, folder):
    api.create_repo(REPO)
    first = api.upload_folder(repo_id=REPO, folder_path=folder)
    hub.requests.clear()
    assert api.upload_folder(repo_id=REPO, folder_path=folder).oid == first.oid
    assert not sent(hub, "PUT")
    assert not sent(hub, "POST", "/commit/")
    (folder / "config.json").write_text('{"r": 4}')
    second = api.upload_folder(repo_id=REPO, folder_path=folder)
    assert hub.repos[REPO].commits[second.oid].parent == first.oid
    assert [commit.commit_id for commit in api.list_repo_commits(REPO)][:2] == [second.oid, first.oid]


def test_create_twice(hub, api):
    api.create_repo(REPO, private=True)
    assert hub.repos[REPO].private
    api.create_repo(REPO, exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    api.delete_repo(REPO)
    assert not hub.repos


def test_commit_ids_repeat(hub):
    ids = [hub.create(REPO, FILES).branches["main"] for _ in range(2)]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 40
    assert hub.repos[REPO].commit({"new": "x"}) != ids[0]


def test_pull_request(hub, api):
    head = hub.create(REPO, FILES).branches["main"]
    info = api.upload_file(path_or_fileobj=b"new", path_in_repo="new.txt", repo_id=REPO, create_pr=True)
    assert info.pr_num == 1
    assert info.pr_revision == "refs/pr/1"
    assert hub.repos[REPO].branches == {"main": head, "refs/pr/1": info.oid}
    assert api.model_info(REPO, revision="refs/pr/1").sha == info.oid
    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert [ref.name for ref in refs.branches] == ["main"]
    assert [ref.ref for ref in refs.pull_requests] == ["refs/pr/1"]
    bob = HfApi(token=BOB)
    assert bob.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="b.bin", repo_id=REPO, create_pr=True).pr_num == 2


def test_a_stale_parent_is_refused(hub, api):
    repo = hub.create(REPO, FILES)
    old, new = repo.branches["main"], repo.commit({"a.txt": "a"})
    add = [CommitOperationAdd("b.txt", b"b")]
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        api.create_commit(REPO, add, commit_message="b", parent_commit=old)
    assert caught.value.response.status_code == 412
    api.create_commit(REPO, add, commit_message="b", parent_commit=new)
    assert repo.files()["b.txt"] == b"b"


def test_branches_and_tags(hub, api, cache):
    repo = hub.create(REPO, FILES)
    first = repo.branches["main"]
    api.create_tag(REPO, tag="v1.0")
    api.create_branch(REPO, branch="next/try", revision="v1.0")
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=REPO, revision="next/try")
    assert repo.files("v1.0") == repo.files() == as_bytes(FILES)
    assert Path(hf_hub_download(REPO, "config.json", revision="next/try", cache_dir=cache)).read_bytes() == b"{}"
    assert Path(hf_hub_download(REPO, "config.json", revision=first[:7], cache_dir=cache)).read_text() == FILES["config.json"]
    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1.0": first}
    assert [ref.name for ref in refs.branches] == ["main", "next/try"]
    for again in (lambda: api.create_tag(REPO, tag="v1.0"), lambda: api.create_branch(REPO, branch="main")):
        with pytest.raises(HfHubHTTPError, match="409"):
            again()
    api.create_tag(REPO, tag="v1.0", exist_ok=True)
    with pytest.raises(RevisionNotFoundError):
        api.create_tag(REPO, tag="v2.0", revision="gone")
    api.delete_tag(REPO, tag="v1.0")
    api.delete_branch(REPO, branch="next/try")
    assert not repo.tags
    assert list(repo.branches) == ["main"]


def test_deleting(hub, api):
    repo = hub.create(REPO, FILES)
    api.delete_file("config.json", REPO)
    api.create_commit(REPO, [CommitOperationDelete("sub/")], commit_message="no notes")
    assert repo.files().keys() == {"README.md", "model.safetensors"}
    with pytest.raises(RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
        api.delete_file("config.json", REPO)


def test_what_the_hub_tells(hub, api):
    repo = hub.create(REPO, FILES)
    info = api.model_info(REPO, files_metadata=True)
    assert info.sha == repo.branches["main"]
    assert info.card_data.base_model == "org/base"
    assert info.library_name == "uc-adapters"
    assert info.tags == ["janus", "base_model:adapter:org/base", "uc-adapters"]
    assert (info.private, info.gated) == (False, False)
    siblings = {sibling.rfilename: sibling for sibling in info.siblings}
    assert siblings["config.json"].blob_id == blob_oid(b'{"r": 2}')
    assert siblings["model.safetensors"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert api.list_repo_files(REPO) == sorted(FILES)
    assert [entry.path for entry in api.list_repo_tree(REPO)] == ["sub", "README.md", "config.json", "model.safetensors"]
    assert [entry.path for entry in api.list_repo_tree(REPO, "sub")] == ["sub/notes.txt"]
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(REPO, "gone"))
    assert [entry.path for entry in api.get_paths_info(REPO, ["sub", "config.json", "gone"])] == ["sub", "config.json"]
    assert api.file_exists(REPO, "config.json")
    assert not api.file_exists(REPO, "gone")
    assert list(api.list_models()) == []


def test_oids_are_those_of_git(hub, tmp_path):
    repo = hub.create(REPO, FILES)
    git = ["git", "hash-object", "--stdin"]
    pointer = (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{hashlib.sha256(WEIGHTS).hexdigest()}\nsize {len(WEIGHTS)}\n"
    )
    entries = {entry.path: entry for entry in HfApi().list_repo_tree(REPO, recursive=True)}
    for path, content in {"config.json": FILES["config.json"], "model.safetensors": pointer}.items():
        assert entries[path].blob_id == subprocess.run(git, input=content, capture_output=True, text=True).stdout.strip()
    assert entries["model.safetensors"].lfs.pointer_size == len(pointer)
    assert repo.files()["model.safetensors"] == WEIGHTS


def test_cards(hub, api):
    hub.create(REPO)
    push = {"path_in_repo": "README.md", "repo_id": REPO}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        api.upload_file(path_or_fileobj=CARD.encode(), **push)
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.upload_file(path_or_fileobj=b"---\nno mapping\n---\n", **push)
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(path_or_fileobj=b"# No metadata", **push)


def test_a_private_repo(hub, cache):
    hub.create(REPO, FILES, private=True)
    for token, status in ((False, 401), (BOB, 404)):
        with pytest.raises(RepositoryNotFoundError, match=str(status)):
            snapshot_download(REPO, cache_dir=cache, token=token)
        with pytest.raises(RepositoryNotFoundError, match=str(status)):
            HfApi().model_info("org/gone", token=token)
    assert contents(snapshot_download(REPO, cache_dir=cache, token=ANN)) == as_bytes(FILES)


def test_a_gated_repo(hub, cache):
    repo = hub.create(REPO, FILES, gated=True)
    assert HfApi().model_info(REPO).gated == "manual"
    for token, status in ((False, 401), (BOB, 403)):
        with pytest.raises(GatedRepoError, match=str(status)):
            snapshot_download(REPO, cache_dir=cache, token=token)
        with pytest.raises(GatedRepoError):
            HfApi().auth_check(REPO, token=token)
    repo.granted.add("bob")
    assert contents(snapshot_download(REPO, cache_dir=cache, token=BOB)) == as_bytes(FILES)


@pytest.mark.parametrize(
    "use",
    [
        lambda cache: HfApi(token="hf_wrong").model_info(REPO),
        lambda cache: hf_hub_download(REPO, "config.json", cache_dir=cache, token="hf_wrong"),
        lambda cache: snapshot_download(REPO, cache_dir=cache, token="hf_wrong"),
        lambda cache: HfApi().create_repo("ann/new", token="hf_wrong"),
    ],
)
def test_a_bad_token(hub, cache, use):
    """Refused even where the repo is public, and not taken for a missing repo."""
    hub.create(REPO, FILES)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as caught:
        use(cache)
    assert type(caught.value) is HfHubHTTPError
    assert caught.value.response.status_code == 401


def test_who_may_write(hub, api):
    hub.create(REPO, FILES)
    assert api.whoami()["name"] == "ann"
    assert [org["name"] for org in api.whoami()["orgs"]] == ["org"]
    api.create_repo("org/new")
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("bob/new")
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(token=BOB).upload_file(path_or_fileobj=b"", path_in_repo="x", repo_id=REPO)
    with pytest.raises(RepositoryNotFoundError, match="401"):
        HfApi(token=False).upload_file(path_or_fileobj=b"", path_in_repo="x", repo_id=REPO)


def test_wrong_revision_and_wrong_file(hub, cache):
    hub.create(REPO, FILES)
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "config.json", revision="gone", cache_dir=cache)
    with pytest.raises(RevisionNotFoundError):
        snapshot_download(REPO, revision="refs/pr/9", cache_dir=cache)
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(REPO, "gone.json", cache_dir=cache)


def test_a_second_snapshot_needs_no_request(hub, cache, monkeypatch):
    head = hub.create(REPO, FILES).branches["main"]
    folder = snapshot_download(REPO, cache_dir=cache)
    assert len(hub.requests) == 2 + 2 * len(FILES)  # info, tree; HEAD and GET of each file
    hub.requests.clear()
    assert snapshot_download(REPO, revision=head, cache_dir=cache) == folder
    assert hub.requests == []
    snapshot_download(REPO, cache_dir=cache)
    assert [path for _, path in hub.requests] == [f"/api/models/{REPO}/revision/main"]
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert snapshot_download(REPO, cache_dir=cache) == folder
    assert hub.requests == []


def test_the_storage_sees_no_token(hub, cache, monkeypatch):
    """Its URLs are signed, and on another origin: a token sent there would be one leaked."""
    hub.create(REPO, FILES, private=True)
    tokens, answer = [], hub.answer

    def spy(method, path, token, body):
        tokens.append(token)
        return answer(method, path, token, body)

    monkeypatch.setattr(hub, "answer", spy)
    hf_hub_download(REPO, "model.safetensors", cache_dir=cache, token=ANN)
    assert tokens == [ANN, None]


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_ranges(hub, path):
    hub.create(REPO, FILES)
    data = as_bytes(FILES)[path]
    url = f"{hub.url}/{REPO}/resolve/main/{path}"
    for asked, expected in (("2-4", data[2:5]), ("2-", data[2:]), ("-3", data[-3:])):
        answer = httpx2.get(url, headers={"Range": f"bytes={asked}"}, follow_redirects=True)
        assert (answer.status_code, answer.content) == (206, expected)
        assert answer.headers["Content-Range"].endswith(f"/{len(data)}")
    assert httpx2.get(url, headers={"Range": "bytes=99999-"}, follow_redirects=True).status_code == 416


@pytest.mark.usefixtures("impatient")
def test_truncated_once(hub, cache):
    """The client resumes."""
    hub.create(REPO, FILES)
    hub.fail("lfs-storage.*safetensors", truncate=100, times=1)
    assert Path(hf_hub_download(REPO, "model.safetensors", cache_dir=cache)).read_bytes() == WEIGHTS
    assert len(sent(hub, "GET", "lfs-storage")) == 2


@pytest.mark.usefixtures("impatient")
def test_truncated_for_good(hub, cache):
    hub.create(REPO, FILES)
    hub.fail("config.json", truncate=3)
    with pytest.raises(httpx2.RemoteProtocolError):
        hf_hub_download(REPO, "config.json", cache_dir=cache)
    assert len(sent(hub, "GET", "config.json")) == 6
    assert not list(cache.rglob("*.incomplete"))
    assert not [file for file in cache.rglob("blobs/*") if file.is_file()]
    hub.heal()
    assert Path(hf_hub_download(REPO, "config.json", cache_dir=cache)).read_text() == FILES["config.json"]


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_corrupt(hub, cache, path):
    """The right length and headers: the client notices nothing."""
    hub.create(REPO, FILES)
    hub.fail(path, corrupt=True)
    data, right = Path(hf_hub_download(REPO, path, cache_dir=cache)).read_bytes(), as_bytes(FILES)[path]
    assert [at for at in range(len(right)) if data[at] != right[at]] == [len(right) // 2]
    assert len(data) == len(right)
    assert len(list(cache.rglob("blobs/*"))) == 1


@pytest.mark.usefixtures("impatient")
def test_unavailable(hub, cache):
    hub.create(REPO, FILES)
    hub.fail("/api/models/", status=503, body=b"down", times=1)
    with pytest.raises(LocalEntryNotFoundError, match="503"):
        snapshot_download(REPO, cache_dir=cache)
    assert len(hub.requests) == 1  # not retried
    hub.fail("/tree/", status=503, times=1)
    snapshot_download(REPO, cache_dir=cache)
    assert len(sent(hub, "GET", "/tree/")) == 2  # retried


def test_rate_limited(hub, cache, monkeypatch):
    slept = []
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=slept.append))
    hub.create(REPO, FILES)
    hub.fail("config.json", method="GET", status=429, headers={"Retry-After": "7"}, times=1)
    hf_hub_download(REPO, "config.json", cache_dir=cache)
    assert slept == [8]  # Retry-After and one second more
    hub.fail("/api/models/", status=429, headers={"Retry-After": "60"}, times=1)
    with pytest.raises(HfHubHTTPError, match="429 Too Many Requests") as caught:
        HfApi().model_info(REPO)  # not retried
    assert caught.value.response.headers["Retry-After"] == "60"


def test_a_refused_commit_changes_nothing(hub, api):
    repo = hub.create(REPO, FILES)
    hub.fail("/commit/", status=500, times=1)
    with pytest.raises(HfHubHTTPError, match="500"):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=REPO)
    assert repo.files() == as_bytes(FILES)


def test_delay(hub):
    hub.create(REPO, FILES)
    hub.fail("/api/models/", delay=0.5)
    with pytest.raises(httpx2.ReadTimeout):
        HfApi().model_info(REPO, timeout=0.1)
    assert HfApi().model_info(REPO, timeout=5).id == REPO


def test_away_and_back(hub, cache):
    head = hub.create(REPO, FILES).branches["main"]
    hf_hub_download(REPO, "config.json", cache_dir=cache)
    hub.stop()
    try:
        with pytest.raises(httpx2.ConnectError):
            HfApi().model_info(REPO)
        assert head in hf_hub_download(REPO, "config.json", cache_dir=cache)
        with pytest.raises((LocalEntryNotFoundError, IncompleteSnapshotError)):
            snapshot_download("org/other", cache_dir=cache)
    finally:
        hub.start()
    assert HfApi().model_info(REPO).sha == head


@pytest.mark.parametrize("path", ["../evil", "/etc/evil"])
def test_unsafe_paths(hub, cache, path):
    hub.create(REPO, {path: "x", "config.json": "{}"})
    assert [file.rfilename for file in HfApi().model_info(REPO).siblings] == [path, "config.json"]
    with pytest.raises(ValueError, match="evil"):
        snapshot_download(REPO, cache_dir=cache)


def test_unknown_routes(hub):
    with pytest.raises(HfHubHTTPError, match="No route"):
        HfApi().get_model_tags()


def test_two_hubs_at_once():
    with LoopbackHub() as one, LoopbackHub() as two:
        one.create("a/b", {"x": "1"})
        assert httpx2.get(f"{one.url}/a/b/resolve/main/x").text == "1"
        assert httpx2.get(f"{two.url}/a/b/resolve/main/x").headers["X-Error-Code"] == "RepoNotFound"


def test_one_hub_a_session():
    assert start_for_session() is start_for_session()


def test_uploads_are_checked(hub, api):
    hub.create(REPO)
    assert httpx2.put(f"{hub.storage_url}/lfs-storage/{'0' * 64}", content=b"x").status_code == 400
    forged = CommitOperationAdd("model.bin", b"x")
    forged._upload_mode, forged._is_uploaded = "lfs", True
    with pytest.raises(BadRequestError, match="does not exist"):
        api.create_commit(REPO, [forged], commit_message="never uploaded")


def test_xet(cache, folder, tmp_path, monkeypatch):
    """The real Xet client against a folder, both ways; neither way uses LFS."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    (folder / "other.bin").write_bytes(WEIGHTS[:5000])
    with LoopbackHub(xet_dir=tmp_path / "xet") as hub:
        hub.add_user("ann", ANN)
        api = HfApi(endpoint=hub.url, token=ANN)
        api.create_repo(REPO)
        api.upload_folder(repo_id=REPO, folder_path=folder)
        assert hub.repos[REPO].files()["model.safetensors"] == WEIGHTS
        pulled = contents(api.snapshot_download(REPO, cache_dir=cache))
        pulled.pop(".gitattributes")
        assert pulled == contents(folder)
        assert not [path for _, path in hub.requests if "lfs" in path]


def hf(*arguments: str, **environment: str) -> str:
    program = Path(sys.executable).with_name("hf")
    result = subprocess.run([program, *arguments], capture_output=True, text=True, env=os.environ | environment, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_command_line(hub, tmp_path):
    repo = hub.create(REPO, FILES, private=True)
    hf("repos", "tag", "create", REPO, "v1.0", HF_TOKEN=ANN)
    assert repo.tags == {"v1.0": repo.branches["main"]}
    assert repo.branches["main"] in hf("models", "info", REPO, "--token", ANN)
    hf("download", REPO, "--revision", "v1.0", "--local-dir", str(tmp_path / "here"), "--token", ANN)
    pulled = {path: data for path, data in contents(tmp_path / "here").items() if not path.startswith(".cache")}
    assert pulled == as_bytes(FILES)
