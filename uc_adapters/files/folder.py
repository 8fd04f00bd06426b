"""An adapter's folder: the files that belong to it, the seal that binds them, and saving that is whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from getpass import getuser
from pathlib import Path

from filelock import FileLock
from huggingface_hub.utils import sha
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..errors import AdapterFileError
from ..version import INSTALL, __version__

PEFT_TYPE = "UNICOMPRESS"
CARD_NAME = "README.md"
PROCESSOR_NAMES = (
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
ADAPTER_NAMES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, *PROCESSOR_NAMES)

# What of a config may change after saving: where the base lies and who wrote the file. All else is mathematics.
UNSEALED = {
    "seal",
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
    "uc_adapters_version",
}
_ON_PURPOSE = f'If you changed it on purpose, break the seal: "seal": null in {CONFIG_NAME}.'
_SAVED = ".uc-adapters-saved"  # a complete save on its way into place
_SAVING = ".uc-adapters-saving-"  # one that is still being written


def read_config(folder: Path) -> dict:
    """The fields in an adapter's config file, as they are written there.

    Raises:
        AdapterFileError: The file is missing, is no JSON object, or describes an adapter of another method.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise _missing(path)
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is no UniCompress config: {error}. Save or fetch the adapter again.") from error
    if not isinstance(config, dict):
        raise AdapterFileError(
            f"{path} is no UniCompress config: a JSON {type(config).__name__}, expected an object of fields. "
            "Save or fetch the adapter again."
        )
    method = config.get("peft_type")
    if method == PEFT_TYPE:
        return config
    if isinstance(method, str) and method in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise AdapterFileError(f"{path} describes a {method} adapter; expected {PEFT_TYPE}. Load it with peft itself.")
    raise AdapterFileError(
        f"{path} is of peft_type {method!r}, which is not known here; expected {PEFT_TYPE}. If it is a newer kind of adapter, "
        f"upgrade uc-adapters and peft. {INSTALL}"
    )


def find_weights(folder: Path) -> Path:
    """The weights file in a folder; AdapterFileError where there is none, or only a pickle."""
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if weights.is_file():
        return weights
    if (folder / WEIGHTS_NAME).is_file():
        raise pickle_only(folder)
    raise _missing(weights)


def check_weights(folder: Path, config: dict) -> None:
    """Raises AdapterFileError unless a folder's weights are whole, and it and `config` are as they were saved together."""
    weights = find_weights(folder)
    seal = _seal_of(config, folder / CONFIG_NAME)
    try:
        with safe_open(weights, framework="pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118  (safe_open is no dict)
    except OSError as error:
        raise AdapterFileError(f"{weights} cannot be read: {error}. Expected a file that you may read.") from error
    except SafetensorError as error:
        expected = f"sha256 {seal['weights_sha256']}" if seal else "the file that save_pretrained wrote"
        raise AdapterFileError(
            f"{weights} is not a safetensors file ({error}); expected {expected}, got sha256 {sha256(weights)}. "
            "It may be a truncated download, an LFS pointer or a web page: fetch it again with force_download=True."
        ) from error
    if seal:
        _check_seal(seal, config, weights)
    _check_sizes(config, shapes, weights)


def seal_folder(folder: Path, base_model: str | None = None) -> None:
    """Writes into the config what its weights file and its own fields are, so that neither is mistaken for another.

    Args:
        folder: With config and weights, as PEFT saved them.
        base_model: The Hub id to name as base. Default: as it stands there.
    """
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text("utf-8"))
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config[name], list):
            config[name].sort()  # PEFT holds a set: the same adapter shall give the same file
    config["base_model_name_or_path"] = base_model or config["base_model_name_or_path"]
    config["uc_adapters_version"] = __version__
    config["seal"] = {"weights_sha256": sha256(folder / SAFETENSORS_WEIGHTS_NAME), "config_sha256": _config_sha256(config)}
    path.write_text(dump_config(config), "utf-8")


def dump_config(config: dict) -> str:
    """A config's fields as they stand in its file."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def sha256(path: Path) -> str:
    """Of a file, in hex, as `sha256sum` prints it."""
    with path.open("rb") as stream:
        return sha.sha_fileobj(stream).hex()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time reads or writes a folder; a save that was killed on its way into place is finished first.

    Raises:
        AdapterFileError: Such a save cannot be finished, since the folder cannot be written.
    """
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    user = os.getuid() if hasattr(os, "getuid") else getuser()  # in a container, a number may have no name
    path = Path(tempfile.gettempdir(), f"uc-adapters-{user}-{key}.lock")
    with ExitStack() as stack:
        with suppress(OSError):  # no room for a lock: the seal still tells if two saves were mixed
            stack.enter_context(FileLock(path, is_singleton=True))  # reentrant: PEFT's loading comes back to ours
        try:
            _move_into_place(folder)
        except OSError as error:
            raise AdapterFileError(
                f"The last save into {folder} was interrupted, and cannot be finished: {error}. Expected a folder that can be "
                "written: open it once where it can."
            ) from error
        yield


@contextmanager
def saving(folder: Path) -> Iterator[Path]:
    """A stage to write a save into; its files replace those of `folder` together, once it is complete.

    Killed before, the folder is as it was; killed after, the next to lock it finishes the move.

    Raises:
        AdapterFileError: The folder is a file, or cannot be written: full, read-only, or not ours.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            for stale in folder.glob(f"{_SAVING}*"):  # of a process that was killed: we hold the lock
                shutil.rmtree(stale)
            stage = Path(tempfile.mkdtemp(prefix=_SAVING, dir=folder))
            try:
                yield stage
                for path in stage.rglob("*"):
                    target = folder / path.relative_to(stage)
                    if target.exists() and target.is_dir() != path.is_dir():
                        raise FileExistsError(f"{target} is {'a folder' if target.is_dir() else 'a file'}")
                stage.rename(folder / _SAVED)
            finally:
                shutil.rmtree(stage, ignore_errors=True)
            _move_into_place(folder)
    except Exception as error:
        if not isinstance(error, (OSError, SafetensorError)) and type(error) is not Exception:  # a tokenizer's own OSError
            raise
        raise AdapterFileError(
            f"The adapter could not be saved to {folder}: {error}. What was there before is as it was; expected a folder that "
            "can be written, with room for it."
        ) from error


def _move_into_place(folder: Path) -> None:
    saved = folder / _SAVED
    if not saved.is_dir():
        return
    for path in sorted(saved.rglob("*")):
        if path.is_file():
            target = folder / path.relative_to(saved)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    shutil.rmtree(saved)


def pickle_only(place: str | Path) -> AdapterFileError:
    return AdapterFileError(
        f"{SAFETENSORS_WEIGHTS_NAME} is missing in {place}, which holds {WEIGHTS_NAME} instead: a pickle, which could run "
        "code on loading. Convert it to safetensors, or ask its author to: save_pretrained writes nothing else."
    )


def _missing(path: Path) -> AdapterFileError:
    return AdapterFileError(
        f"{path.name} is missing in {path.parent}; expected {CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME}. "
        "Give the folder that save_pretrained wrote (or its subfolder=), or save the adapter again."
    )


def _seal_of(config: dict, path: Path) -> dict | None:
    """The seal; None in what plain PEFT or uc-adapters 0.1 wrote."""
    seal = config.get("seal")
    whole = isinstance(seal, dict) and seal.keys() == {"weights_sha256", "config_sha256"}
    if seal is not None and not whole:
        raise AdapterFileError(
            f"{path} has a broken seal {seal!r}; expected weights_sha256 and config_sha256. Save or fetch the adapter again."
        )
    return seal


def _check_seal(seal: dict, config: dict, weights: Path) -> None:
    if (actual := sha256(weights)) != seal["weights_sha256"]:
        raise AdapterFileError(
            f"{weights} is not the file that was saved with its config: expected sha256 {seal['weights_sha256']}, got "
            f"{actual}. It was damaged or swapped: fetch it again with force_download=True, or save the adapter again. "
            f"{_ON_PURPOSE}"
        )
    if (actual := _config_sha256(config)) != seal["config_sha256"]:
        raise AdapterFileError(
            f"{weights.parent / CONFIG_NAME} was changed after it was saved: its fields have sha256 {actual}, expected "
            f"{seal['config_sha256']}. Fetch it again, or save the adapter again. {_ON_PURPOSE}"
        )


def _check_sizes(config: dict, shapes: list[list[int]], weights: Path) -> None:
    """Refuses a size that no weight in the file has before it is built: it may be beyond any memory."""
    widest = max((side for shape in shapes for side in shape), default=0)
    ranks = config.get("rank_pattern")
    sizes = {f"rank_pattern[{name!r}]": rank for name, rank in ranks.items()} if isinstance(ranks, dict) else {}
    sizes |= {name: config.get(name) for name in ("r", "num_global_tokens", "decompressor_width")}
    limits = {**dict.fromkeys(sizes, widest), "decompressor_layers": len(shapes)}
    for name, limit in limits.items():
        size = sizes.get(name, config.get(name))
        if isinstance(size, (int, float)) and size > limit:
            raise AdapterFileError(
                f"The weights in {weights} do not fit its config: {name}={size}, and nothing in the file is larger than "
                f"{limit}. The file was damaged or belongs to another config: fetch or save the adapter again."
            )


def _config_sha256(config: dict) -> str:
    fields = {name: value for name, value in config.items() if name not in UNSEALED}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
