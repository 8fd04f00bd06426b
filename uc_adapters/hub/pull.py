"""Pulling an adapter: one snapshot of its own files at one commit, checked against the Hub's checksums, then only the disk."""

from __future__ import annotations

from os import PathLike
from pathlib import Path, PurePosixPath

from huggingface_hub import RepoFile, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from huggingface_hub.utils import sha
from peft.utils import CONFIG_NAME

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
    except CachedRepoTreeNotFoundError:  # cached file by file, by another tool, and offline now
        tree = []
    _refuse_unsafe_paths(repo_id, tree)
    if not Path(snapshot, prefix, CONFIG_NAME).exists():
        raise _absent(repo_id, revision, commit, prefix, {file.path for file in tree})
    for name in ADAPTER_NAMES:
        _check_bytes(Path(snapshot, prefix, name), f"{repo_id}@{commit[:8]}")
    return Path(snapshot, prefix)


def _refuse_unsafe_paths(repo_id: str, tree: list[RepoFile]) -> None:
    for file in tree:
        parts = file.path.replace("\\", "/").split("/")
        if ".." in parts or parts[0] == "" or parts[0].endswith(":"):
            raise AdapterFileError(
                f"Repo {repo_id!r} contains an unsafe path, {file.path!r}, which points out of its folder; expected none. "
                "Nothing was loaded: do not trust this repo, and tell its author."
            )


def _absent(repo_id: str, revision: str | None, commit: str, prefix: str, paths: set[str]) -> HubError:
    folders = sorted(path.removesuffix(CONFIG_NAME).rstrip("/") or "." for path in paths if path.endswith(CONFIG_NAME))
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
    blob = path.resolve()
    kind, actual = ("sha256", sha256(blob)) if len(blob.name) == 64 else ("git sha1", sha.git_hash(blob.read_bytes()))
    if actual == blob.name:
        return
    blob.unlink(missing_ok=True)  # a damaged one must not be found again
    path.unlink(missing_ok=True)
    raise AdapterFileError(
        f"{path.name} of {source} was damaged on its way or in the cache: expected {kind} {blob.name}, got {actual}. The "
        "damaged copy is removed; load again, with force_download=True if it persists."
    )
