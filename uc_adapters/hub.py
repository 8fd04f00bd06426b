"""Reading an adapter's files: what is wrong with one is said before anything is attached."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from .config import UniCompressConfig
from .errors import AdapterFileError, ConfigError

_DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")


def read_adapter(adapter: str, *, subfolder: str | None = None, **kwargs) -> UniCompressConfig:
    """The config of an adapter folder or Hub repo, once both of its files are found whole.

    Args:
        adapter: A folder, or a Hub id.
        subfolder: Of the folder or repo.
        **kwargs: Of `hf_hub_download`: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`; others
            are left alone.

    Raises:
        AdapterFileError: A file is missing, or the weights are no safetensors file.
        ConfigError: The config holds an unknown field or a value out of range.
    """
    options = {name: kwargs[name] for name in _DOWNLOAD_OPTIONS if name in kwargs}
    config_file = _find(adapter, CONFIG_NAME, subfolder, options)
    try:
        config = UniCompressConfig.from_pretrained(str(config_file.parent))
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        raise AdapterFileError(f"{config_file} is no UniCompress config: {error}. Save or fetch the adapter again.") from error
    if not isinstance(config, UniCompressConfig):
        raise AdapterFileError(
            f"{config_file} describes a {config.peft_type} adapter; expected UNICOMPRESS. Load it with peft itself."
        )
    weights = _find(adapter, SAFETENSORS_WEIGHTS_NAME, subfolder, options)
    try:
        with safe_open(weights, framework="pt"):
            pass
    except SafetensorError as error:
        raise AdapterFileError(
            f"{weights} is not a safetensors file ({error}); expected the weights that save_pretrained wrote. "
            "It may be a truncated download, an LFS pointer or a web page: fetch it again with force_download=True."
        ) from error
    return config


def _find(adapter: str, name: str, subfolder: str | None, options: dict) -> Path:
    folder = Path(adapter)
    if folder.is_dir():
        path = folder / subfolder / name if subfolder else folder / name
        if path.is_file():
            return path
        raise AdapterFileError(
            f"{name} is missing in {path.parent}; expected {CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME}. "
            "Save the adapter again with save_pretrained, which writes safetensors."
        )
    try:
        return Path(hf_hub_download(adapter, name, subfolder=subfolder, **options))
    except Exception as error:  # a Hub has many ways to fail; each tells its own in the message
        raise AdapterFileError(
            f"{adapter!r} is no folder here, and {name} could not be fetched from the Hub: {error} "
            "Expected the folder that save_pretrained wrote, or a Hub id of the form 'org/name'."
        ) from error
