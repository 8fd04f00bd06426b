"""Pulls an adapter: one snapshot of its own files at one commit. After that, only the disk is read."""

from __future__ import annotations

from contextlib import suppress
from os import PathLike
from pathlib import Path, PurePosixPath

from huggingface_hub import get_cached_repo_tree, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers.utils import CONFIG_NAME as MODEL_CONFIG_NAME

from ..errors import HubError
from .faults import reason
from .folder import PROCESSOR_NAMES, checked_sha256

PULL_OPTIONS = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")


def pull(adapter: str | PathLike, *, subfolder: str | None = None, **options) -> Path:
    """Returns the local folder of an adapter; downloads it first if `adapter` is a Hub id.

    The weights are not checked here: `check_weights` hashes them.

    Args:
        adapter: A folder, or a Hub id.
        subfolder: The adapter's subfolder in the folder or repo.
        **options: `revision`, `token`, `cache_dir`, `local_files_only` and `force_download` of
            `huggingface_hub.snapshot_download`.

    Raises:
        HubError: The repo, revision or subfolder does not exist, may not be read, or the Hub cannot be reached. The message
            says which, and what to do.
        AdapterFileError: The config or a file of the processor does not have the Hub's checksum.
    """
    folder = Path(adapter)
    if folder.is_dir():
        return folder / subfolder if subfolder else folder
    repo_id, where = str(adapter), {name: options.get(name) for name in ("revision", "token", "cache_dir")}
    prefix = f"{PurePosixPath(subfolder)}/" if subfolder else ""
    checked = (CONFIG_NAME, *PROCESSOR_NAMES)
    patterns = [prefix + name for name in (*checked, SAFETENSORS_WEIGHTS_NAME)]
    try:
        snapshot = Path(snapshot_download(repo_id, allow_patterns=patterns, library_name="uc-adapters", **options))
    except Exception as error:  # a Hub has many ways to fail: `reason` tells them apart
        raise HubError(
            f"{repo_id!r} is no folder here, and could not be fetched from the Hub. {reason(error, repo_id, **where)}"
        ) from error
    folder, where["revision"] = snapshot / prefix, snapshot.name
    if not options.get("local_files_only"):
        _note_that_there_is_no_model(repo_id, **where)
    if not (folder / CONFIG_NAME).exists():
        place = f"{f'subfolder {subfolder!r}' if subfolder else 'the top folder'} of repo {repo_id!r}"
        revision = options.get("revision") or "its main branch"
        raise HubError(
            f"{CONFIG_NAME} is missing in {place} at {revision} ({snapshot.name[:8]}); folders with an adapter: "
            f"{_adapters_in(repo_id, **where)}. Choose one with subfolder=, or another repo or revision=."
        )
    for name in checked:
        if (folder / name).exists():
            checked_sha256(folder / name)
    return folder


def _note_that_there_is_no_model(repo_id: str, *, revision: str, cache_dir: str | PathLike | None, **access) -> None:
    """Asks for a model's config, so that the cache notes that the repo has none.

    transformers looks for that config before it loads a processor. Offline, it relies on this note.
    """
    where = {"repo_id": repo_id, "filename": MODEL_CONFIG_NAME, "revision": revision, "cache_dir": cache_dir}
    if try_to_load_from_cache(**where) is None:
        with suppress(Exception):  # usually the answer is that it is missing; no other answer may stop a load
            hf_hub_download(**where, **access)


def _adapters_in(repo_id: str, *, revision: str, cache_dir: str | PathLike | None, **_) -> str:
    paths = []
    with suppress(CachedRepoTreeNotFoundError):  # another tool filled the cache file by file, and we are offline
        paths = [PurePosixPath(file.path) for file in get_cached_repo_tree(repo_id, revision=revision, cache_dir=cache_dir)]
    folders = sorted(str(path.parent) for path in paths if path.name == CONFIG_NAME)
    return ", ".join("the top folder" if folder == "." else folder for folder in folders) or "none"
