"""Loads the base that an adapter names, at the commit that it names."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.utils import CONFIG_NAME, cached_file

from ..errors import BaseModelError
from ..families import FAMILIES, check_present, make_loadable
from ..files.faults import reason
from ..identity import at, remember_commit

if TYPE_CHECKING:
    from ..config import UniCompressConfig


def load_base(
    adapter: str, base: str | PathLike | None, stored: UniCompressConfig, options: dict[str, object], access: dict[str, object]
) -> nn.Module:
    """Loads `base`, or else the base that the adapter's config names, at the commit recorded there.

    Args:
        adapter: The name of the adapter, for messages.
        base: A folder, a Hub id, or None.
        stored: The adapter's config.
        options: `dtype`, `device_map`, ... of transformers' `from_pretrained`; None means its default.
        access: `token`, `cache_dir` and `local_files_only`.

    Raises:
        BaseModelError: No base is named, or it cannot be loaded: not found, gated, offline, of a type that the installed
            transformers does not have yet, ...
    """
    model_type = (stored.base_geometry or {}).get("model_type")
    check_present(model_type)
    make_loadable(model_type)
    source = str(base or stored.base_model_name_or_path or "")
    revision = None if base else stored.revision
    if not source:
        raise BaseModelError(f"Adapter {adapter!r} names no base; expected one: pass base_model=, a path, an id or a model.")
    family = FAMILIES.get(model_type)
    inside = family.base_subfolder if family is not None else ""
    if Path(source).is_dir() and not any(Path(source, folder, CONFIG_NAME).is_file() for folder in ("", inside)):
        # such as the adapter's own folder
        raise BaseModelError(
            f"Adapter {adapter!r} needs a base, and {source} holds none: {CONFIG_NAME} is missing. Pass base_model= with its "
            "folder, its id or the loaded model."
        )
    options = {name: value for name, value in options.items() if value is not None}
    commit = None
    try:
        if not Path(source).is_dir():
            revision = HfApi().resolve_revision(source, revision=revision, **access)
            commit = revision.resolved
        options["adapter_kwargs"] = access  # else transformers asks online whether the base is an adapter
        if inside and _has_config(source, revision, inside, access):
            options["subfolder"] = inside
        model = AutoModelForImageTextToText.from_pretrained(source, revision=revision, **access, **options)
    except Exception as error:  # a Hub has many ways to fail: `reason` tells them apart
        raise BaseModelError(
            f"Adapter {adapter!r} needs base {at(source, revision)}, which could not be loaded. "
            f"{reason(error, source, revision, access['token'], access['cache_dir'])} "
            "Or pass base_model= with its folder, its id or the loaded model."
        ) from error
    if commit is not None:
        remember_commit(model, commit)
    return model


def _has_config(source: str, revision: object, subfolder: str, access: dict[str, object]) -> bool:
    """Whether a folder or repo has a base in this subfolder."""
    missing = {"_raise_exceptions_for_missing_entries": False}
    return cached_file(source, CONFIG_NAME, subfolder=subfolder, revision=revision, **missing, **access) is not None
