"""Pulling an adapter: one snapshot of its own files at one commit, checked against the Hub's checksums, then only the disk."""

from __future__ import annotations

from os import PathLike
from pathlib import Path, PurePosixPath

from huggingface_hub import RepoFile, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from huggingface_hub.utils import sha
from peft.utils import CONFIG_NAME, WEIGHTS_NAME

from ..errors import AdapterFileError, HubError
from .faults import reason
from .folder import ADAPTER_NAMES, sha256

PULL_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def pull(
    adapter: str | PathLike,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """The local folder of an adapter: itself where it is one, else its files in the Hub's cache, downloaded if need be.

    Args:
        adapter: A folder, or a Hub id.
        subfolder: Of the folder or repo.
        revision: Branch, tag or commit of the repo. Default: its main branch.
        token: See `huggingface_hub.snapshot_download`, as the other arguments below. Default: the token logged in with.
        cache_dir: Default: the Hub's own cache.
        local_files_only: Sends no request. Default False.
        force_download: Downloads again what is in the cache. Default False.

    Raises:
        HubError: The repo, revision or subfolder is not there or not yours to read, or the Hub cannot be reached; the message
            says which, and what to do.
        AdapterFileError: A file does not have the checksum that the Hub tells, or the repo holds an unsafe path.
    """
    folder = Path(adapter)
    if folder.is_dir():
        return folder / subfolder if subfolder else folder
    repo_id = str(adapter)
    prefix = f"{PurePosixPath(subfolder)}/" if subfolder else ""
    try:
        snapshot = snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            allow_patterns=[prefix + name for name in ADAPTER_NAMES],
            library_name="uc-adapters",
        )
    except Exception as error:  # a Hub has many ways to fail: `reason` tells them apart
        raise HubError(
            f"{repo_id!r} is no folder here, and could not be fetched from the Hub. {reason(error, repo_id, revision, token)}"
        ) from error
    commit = Path(snapshot).name
    try:
        tree = get_cached_repo_tree(repo_id, revision=commit, cache_dir=cache_dir)
    except CachedRepoTreeNotFoundError:  # cached file by file, by another tool, and offline: no checksums are known
        return Path(snapshot, prefix)
    _refuse_unsafe_paths(repo_id, tree)
    _check_presence(repo_id, revision, commit, prefix, {file.path for file in tree})
    for file in tree:
        if file.path.startswith(prefix) and file.path.removeprefix(prefix) in ADAPTER_NAMES:
            _check_bytes(Path(snapshot, file.path), file, f"{repo_id}@{commit[:8]}")
    return Path(snapshot, prefix)


def _refuse_unsafe_paths(repo_id: str, tree: list[RepoFile]) -> None:
    for file in tree:
        parts = file.path.replace("\\", "/").split("/")
        if ".." in parts or parts[0] == "" or parts[0].endswith(":"):
            raise AdapterFileError(
                f"Repo {repo_id!r} contains an unsafe path, {file.path!r}, which points out of its folder; expected none. "
                "Nothing was loaded: do not trust this repo, and tell its author."
            )


def _check_presence(repo_id: str, revision: str | None, commit: str, prefix: str, paths: set[str]) -> None:
    if prefix + CONFIG_NAME in paths:
        return
    folders = sorted(path.removesuffix(CONFIG_NAME).rstrip("/") or "." for path in paths if path.endswith(CONFIG_NAME))
    pickled = f" It holds {WEIGHTS_NAME}, a pickle, which is not read." if prefix + WEIGHTS_NAME in paths else ""
    raise HubError(
        f"{CONFIG_NAME} is missing in {f'subfolder {prefix[:-1]!r}' if prefix else 'the top folder'} of repo {repo_id!r} at "
        f"{revision or 'its main branch'} ({commit[:8]}); folders with an adapter: {', '.join(folders) or 'none'}.{pickled} "
        "Choose one with subfolder=, or another repo or revision=."
    )


def _check_bytes(path: Path, file: RepoFile, source: str) -> None:
    """Raises AdapterFileError, and takes the copy out of the cache, unless it has the checksum in the repo's tree."""
    expected, actual = (
        (f"sha256 {file.lfs.sha256}", f"sha256 {sha256(path)}")
        if file.lfs
        else (f"git sha1 {file.blob_id}", f"git sha1 {sha.git_hash(path.read_bytes())}")
    )
    if actual == expected:
        return
    path.resolve().unlink(missing_ok=True)  # the blob that the snapshot links to: a damaged one must not be found again
    path.unlink(missing_ok=True)
    raise AdapterFileError(
        f"{file.path} of {source} was damaged on its way or in the cache: expected {expected}, got {actual}. The damaged copy "
        "is removed; load again, with force_download=True if it persists."
    )
