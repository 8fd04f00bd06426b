"""An adapter's folder on disk: its files, the seal that binds config and weights, and saving."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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

# These fields may change after saving: they say where the base is and who wrote the file. The seal covers all others.
UNSEALED = {
    "seal",
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
    "uc_adapters_version",
}
_STAGE = ".uc-adapters-saving-"
_AGAIN = "Save or fetch the adapter again (force_download=True)."
_ON_PURPOSE = f'{_AGAIN} If you changed it on purpose, break the seal: "seal": null in {CONFIG_NAME}.'


def read_config(folder: Path) -> dict:
    """Reads the fields of an adapter's config file.

    Raises:
        AdapterFileError: The file is missing, is not a JSON object, or belongs to another method.
    """
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError(f"a JSON {type(config).__name__}, expected an object of fields")
    except FileNotFoundError as error:
        raise _missing(path) from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is no UniCompress config: {error}. {_AGAIN}") from error
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
    """Returns the path of a folder's weights file; raises AdapterFileError if there is none."""
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        raise _missing(weights)
    return weights


def check_weights(folder: Path, config: dict) -> None:
    """Raises AdapterFileError unless a folder's weights are whole, and `config` was saved together with them.

    Args:
        folder: The adapter's folder.
        config: The fields that `read_config` returned for it.
    """
    weights = find_weights(folder)
    seal = config.get("seal", "missing")
    if seal is not None and not (isinstance(seal, dict) and seal.keys() == {"weights_sha256", "config_sha256"}):
        raise AdapterFileError(
            f"{folder / CONFIG_NAME} has a broken seal {seal!r}; expected weights_sha256 and config_sha256. {_ON_PURPOSE}"
        )
    try:
        actual = checked_sha256(weights)
        with safe_open(weights, framework="pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118  (safe_open is no dict)
    except OSError as error:
        raise AdapterFileError(f"{weights} cannot be read: {error}. Expected a file that you may read.") from error
    except SafetensorError as error:
        expected = f"sha256 {seal['weights_sha256']}" if seal else "the file that save_pretrained wrote"
        raise AdapterFileError(
            f"{weights} is not a safetensors file ({error}); expected {expected}, got sha256 {actual}. It may be a truncated "
            f"download, an LFS pointer or a web page. {_AGAIN}"
        ) from error
    if seal and actual != seal["weights_sha256"]:
        raise AdapterFileError(
            f"{weights} is not the file that was saved with its config: expected sha256 {seal['weights_sha256']}, got "
            f"{actual}. It was damaged or swapped, or a save was interrupted. {_ON_PURPOSE}"
        )
    if seal and (actual := _config_sha256(config)) != seal["config_sha256"]:
        raise AdapterFileError(
            f"{folder / CONFIG_NAME} was changed after it was saved: expected sha256 {seal['config_sha256']} of its fields, "
            f"got {actual}. {_ON_PURPOSE}"
        )
    _check_sizes(config, shapes, weights)


def checked_sha256(path: Path) -> str:
    """Hashes a file; raises AdapterFileError if it is a damaged copy in the Hub's cache, and removes that copy.

    The cache names each blob by its checksum: sha256 for LFS files, git's sha1 for others. On a system without links there
    are no blobs, and only the seal protects the files.
    """
    with path.open("rb") as stream:
        digest = sha.sha_fileobj(stream).hex()
    # With Xet, the blob itself is a link into a store that all repos share
    blob = Path(os.path.normpath(path.parent / os.readlink(path))) if path.is_symlink() else path
    if not _is_blob(blob):
        return digest
    kind, actual = ("sha256", digest) if len(blob.name) == 64 else ("git sha1", sha.git_hash(path.read_bytes()))
    if actual == blob.name:
        return digest
    for damaged in (blob.resolve(), blob, path):
        damaged.unlink(missing_ok=True)
    raise AdapterFileError(
        f"{path} was damaged during the download or in the cache: expected {kind} {blob.name}, got {actual}. The damaged copy "
        "is removed: load again, with force_download=True if the error persists."
    )


def _is_blob(path: Path) -> bool:
    """Whether a file is a blob of the Hub's cache. A person's own links lead elsewhere."""
    return (
        re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", path.name) is not None
        and path.parent.name == "blobs"
        and path.parent.parent.name.startswith("models--")
    )


def seal_folder(folder: Path, base_model: str | None = None) -> None:
    """Writes into the config the checksums of its own fields and of the weights file.

    Args:
        folder: A folder with config and weights, as PEFT saved them.
        base_model: The Hub id of the base. Default: the name that the config has.
    """
    config = json.loads((folder / CONFIG_NAME).read_bytes())
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config[name], list):
            config[name].sort()  # PEFT holds a set, whose order differs between processes
    config["base_model_name_or_path"] = base_model or config["base_model_name_or_path"]
    config["uc_adapters_version"] = __version__
    weights = checked_sha256(folder / SAFETENSORS_WEIGHTS_NAME)
    config["seal"] = {"weights_sha256": weights, "config_sha256": _config_sha256(config)}
    (folder / CONFIG_NAME).write_text(dump_config(config), "utf-8")


def dump_config(config: dict) -> str:
    """Formats a config's fields as the text of its file."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


@contextmanager
def saving(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder; afterwards its files replace those of `folder`, the weights first and the config last.

    If the save fails, `folder` stays as it was. If the process is killed while the files are replaced, the weights and the
    config are of two saves, which the seal tells; saving again completes the folder.

    Raises:
        AdapterFileError: The folder is a file, or cannot be written: full, read-only, or not ours.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(f"{_STAGE}*"):  # of a save that was killed
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=_STAGE, dir=folder) as directory:
            stage = Path(directory)
            yield stage
            files = sorted((path for path in stage.rglob("*") if path.is_file()), key=_order)
            targets = [folder / path.relative_to(stage) for path in files]
            for target in targets:
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.is_dir():
                    raise FileExistsError(f"{target} is a folder")
            for path, target in zip(files, targets, strict=True):
                os.replace(path, target)
    except Exception as error:
        if not isinstance(error, (OSError, SafetensorError)) and type(error) is not Exception:  # a tokenizer's own OSError
            raise
        raise AdapterFileError(
            f"The adapter could not be saved to {folder}: {error}. What was there before is as it was; expected a folder that "
            "can be written, with room for it."
        ) from error


def _order(path: Path) -> int:
    return {SAFETENSORS_WEIGHTS_NAME: 0, CONFIG_NAME: 2}.get(path.name, 1)


def _missing(path: Path) -> AdapterFileError:
    return AdapterFileError(
        f"{path.name} is missing in {path.parent}; expected {CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME}. Give the folder that "
        f"save_pretrained wrote (or its subfolder=), or save the adapter again. If there is {WEIGHTS_NAME} instead, convert it "
        "to safetensors: a pickle could run code, and is never loaded."
    )


def _check_sizes(config: dict, shapes: list[list[int]], weights: Path) -> None:
    """Refuses a size that no weight in the file has: the module would be built first, and may not fit into any memory."""
    widest = max((side for shape in shapes for side in shape), default=0)
    ranks = config.get("rank_pattern")
    limits = {f"rank_pattern[{name!r}]": (rank, widest) for name, rank in ranks.items()} if isinstance(ranks, dict) else {}
    limits |= {name: (config.get(name), widest) for name in ("r", "num_global_tokens", "decompressor_width")}
    limits["decompressor_layers"] = config.get("decompressor_layers"), len(shapes)
    for name, (size, limit) in limits.items():
        if isinstance(size, (int, float)) and size > limit:
            raise AdapterFileError(
                f"The weights in {weights} do not fit its config: {name}={size}, expected at most {limit}, the largest in the "
                f"file. {_AGAIN}"
            )


def _config_sha256(config: dict) -> str:
    fields = {name: value for name, value in config.items() if name not in UNSEALED}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
