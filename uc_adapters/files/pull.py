"""Pulling an adapter: one snapshot of its own files at one commit, checked against the Hub's checksums, then only the disk."""

from __future__ import annotations

import os
from contextlib import suppress
from os import PathLike
from pathlib import Path, PurePosixPath

from huggingface_hub import get_cached_repo_tree, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from huggingface_hub.utils import sha
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from transformers.utils import CONFIG_NAME as MODEL_CONFIG_NAME

from ..errors import AdapterFileError, HubError
from .faults import reason
from .folder import ADAPTER_NAMES, pickle_only, sha256

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
            f"{repo_id!r} is no folder here, and could not be fetched from the Hub. "
            f"{reason(error, repo_id, revision, token, cache_dir)}"
        ) from error
    commit = Path(snapshot).name
    if not local_files_only:
        _note_that_there_is_no_model(repo_id, commit, token, cache_dir)
    try:
        tree = get_cached_repo_tree(repo_id, revision=commit, cache_dir=cache_dir)
    except CachedRepoTreeNotFoundError:  # cached file by file, by another tool, and offline now
        tree = []
    paths = {file.path for file in tree}
    _refuse_unsafe_paths(repo_id, paths)
    if not Path(snapshot, prefix, CONFIG_NAME).exists():
        raise _absent(repo_id, revision, commit, prefix, paths)
    if prefix + WEIGHTS_NAME in paths and prefix + SAFETENSORS_WEIGHTS_NAME not in paths:
        raise pickle_only(f"repo {repo_id!r}")
    for name in ADAPTER_NAMES:
        _check_bytes(Path(snapshot, prefix, name), f"{repo_id}@{commit[:8]}")
    return Path(snapshot, prefix)


def _note_that_there_is_no_model(repo_id: str, commit: str, token: str | bool | None, cache_dir: str | PathLike | None) -> None:
    """transformers looks for a model's config before it loads a processor, and offline believes only what it saw missing."""
    if try_to_load_from_cache(repo_id, MODEL_CONFIG_NAME, cache_dir=cache_dir, revision=commit) is None:
        with suppress(Exception):  # the usual answer is that it is missing; no other one shall stop a load
            hf_hub_download(repo_id, MODEL_CONFIG_NAME, revision=commit, token=token, cache_dir=cache_dir)


def _refuse_unsafe_paths(repo_id: str, paths: set[str]) -> None:
    for path in sorted(paths):
        parts = path.replace("\\", "/").split("/")
        if ".." in parts or parts[0] == "" or parts[0].endswith(":"):
            raise AdapterFileError(
                f"Repo {repo_id!r} contains an unsafe path, {path!r}, which points out of its folder; expected none. "
                "Nothing was loaded: do not trust this repo, and tell its author."
            )


def _absent(repo_id: str, revision: str | None, commit: str, prefix: str, paths: set[str]) -> HubError:
    adapters = sorted(path.removesuffix(CONFIG_NAME).rstrip("/") for path in paths if path.split("/")[-1] == CONFIG_NAME)
    folders = [folder or "the top folder" for folder in adapters]
    return HubError(
        f"{CONFIG_NAME} is missing in {f'subfolder {prefix[:-1]!r}' if prefix else 'the top folder'} of repo {repo_id!r} at "
        f"{revision or 'its main branch'} ({commit[:8]}); folders with an adapter: {', '.join(folders) or 'none'}. "
        "Choose one with subfolder=, or another repo or revision=."
    )


def _check_bytes(path: Path, source: str) -> None:
    """Raises AdapterFileError, and takes the copy out of the cache, unless it has the checksum that the Hub told.

    The cache names each blob by it: sha256 for LFS files, git's sha1 for others. Where links cannot be made, and so there
    are no blobs, the adapter's seal remains.
    """
    if not path.is_symlink():
        return
    blob = path.parent / os.readlink(path)  # one step: with Xet it is itself a link, into a store that all repos share
    kind, actual = ("sha256", sha256(blob)) if len(blob.name) == 64 else ("git sha1", sha.git_hash(blob.read_bytes()))
    if actual == blob.name:
        return
    for damaged in (blob.resolve(), blob, path):  # must not be found again
        damaged.unlink(missing_ok=True)
    raise AdapterFileError(
        f"{path.name} of {source} was damaged on its way or in the cache: expected {kind} {blob.name}, got {actual}. The "
        "damaged copy is removed; load again, with force_download=True if it persists."
    )
