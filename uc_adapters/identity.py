"""Records which base an adapter was trained on, and compares it with the base that it is loaded on."""

from __future__ import annotations

import math
import warnings
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RevisionResolutionError
from torch import nn

from .errors import BaseModelError

if TYPE_CHECKING:
    from .config import UniCompressConfig
    from .families import Family

SIZE = 16  # numbers in a sketch
SAMPLE = 32  # values of each weight that a sketch uses
# bfloat16 changes a sketch by less than 0.004; float16 by 0.02, if a weight underflows; another base by tenths
TOLERANCE = 0.03


def identify(config: UniCompressConfig, family: Family) -> None:
    """Records the base in a new adapter's config, or compares a trained adapter's record with the base.

    Raises:
        BaseModelError: The base has other shapes or another codebook, so the adapter would compute something else.

    Warns:
        UserWarning: Only the weights or their commit differ.
    """
    name, commit = name_and_commit(family.base)
    shapes, fingerprint = asdict(family.geometry), _fingerprint(family)
    if config.base_geometry is None:
        config.base_geometry, config.base_fingerprint = shapes, fingerprint
        config.base_model_name_or_path, config.revision = name, commit
        return
    trained_on = f"The adapter was trained on {at(config.base_model_name_or_path, config.revision)}, got {at(name, commit)}"
    recorded = config.base_geometry
    differing = [key for key in sorted(recorded) if shapes.get(key) != recorded[key]]
    if differing:
        changes = ", ".join(f"{key} was {recorded[key]}, is {shapes.get(key)}" for key in differing)
        raise BaseModelError(f"{trained_on}, which is another base: {changes}. Load it on the base it names.")
    if _differ(config.base_fingerprint, fingerprint, "codebook"):
        raise BaseModelError(
            f"{trained_on}, which has another codebook: its codes stand for other images. Load it on the base it names."
        )
    other_commit = None not in (commit, config.revision) and commit != config.revision
    if other_commit or _differ(config.base_fingerprint, fingerprint, "weights"):
        warnings.warn(
            f"{trained_on}: shapes and codebook agree, {'the commit differs' if other_commit else 'the weights differ'}. It "
            "may read and draw worse than it was measured to.",
            stacklevel=2,
        )


def name_and_commit(base: nn.Module) -> tuple[str | None, str | None]:
    """Returns the id or folder that a base was loaded from, and its commit if that was a Hub repo.

    transformers does not record the commit. `remember_commit` does for the bases that we load. For others, this returns the
    commit of the main branch in the cache, and the fingerprint tells whether that was right.
    """
    name = getattr(base, "name_or_path", None) or None
    if name is not None and Path(name).exists():
        return str(Path(name).resolve()), None  # absolute, so that it cannot look like a Hub id
    commit = getattr(base.config, "_commit_hash", None)
    if commit is None and name is not None:
        with suppress(HFValidationError, RevisionResolutionError):
            commit = HfApi().resolve_revision(name, local_files_only=True).resolved
    return name, commit


def remember_commit(base: nn.Module, commit: str | None) -> None:
    """Records the commit that a base was loaded at, in an attribute of its config that is not saved."""
    base.config._commit_hash = commit


def at(name: str | None, commit: str | None) -> str:
    """Returns `name@commit`, for messages."""
    return f"{name or 'a base without a name'}@{commit[:8] if commit else 'unknown'}"


def is_fingerprint(value: object) -> bool:
    """Returns whether a value from a config file can be compared with a base."""
    if value is None:
        return True
    return isinstance(value, dict) and all(
        part is None
        or (isinstance(part, list) and len(part) == SIZE and all(isinstance(x, float) and math.isfinite(x) for x in part))
        for part in value.values()
    )


def _fingerprint(family: Family) -> dict[str, list[float] | None]:
    """Returns sketches of the codebook and of the weights' first values; None if they are quantised or not loaded."""
    weights = {
        name.replace(".base_layer", ""): parameter for name, parameter in family.base.named_parameters() if "lora_" not in name
    }
    # Some quantised layers hold buffers in place of weights, which the parameters do not show
    quantised = getattr(family.base, "is_quantized", False)
    if quantised or not all(map(_is_plain, weights.values())):
        return {"codebook": None if family.codebook.is_meta else _sketch(family.codebook.cpu()), "weights": None}
    samples = torch.zeros(len(weights), SAMPLE)
    for row, name in enumerate(sorted(weights)):
        sample = weights[name].detach().flatten()[:SAMPLE]
        samples[row, : len(sample)] = sample.float().cpu()
    return {"codebook": _sketch(family.codebook.cpu()), "weights": _sketch(samples)}


def _is_plain(weight: nn.Parameter) -> bool:
    """Returns whether a weight holds plain numbers: it is not quantised, not of a special class, and not offloaded."""
    return type(weight) is nn.Parameter and weight.is_floating_point() and not weight.is_meta and bool(weight.numel())


def _sketch(rows: torch.Tensor) -> list[float]:
    """Returns SIZE sums over the N rows of (N, d). Rows are normalised, and weighted by a fixed pattern."""
    rows = nn.functional.normalize(rows.double(), dim=1)
    row, column = torch.arange(rows.shape[0])[:, None], torch.arange(rows.shape[1])
    weighted = (rows * torch.sin(12.9898 * row + 78.233 * column)).sum(1)  # (N,)
    sums = torch.zeros(SIZE, dtype=torch.float64).index_add_(0, row.flatten() % SIZE, weighted)
    return [round(value, 4) for value in (sums / math.sqrt(len(rows) / SIZE)).tolist()]


def _differ(recorded: dict | None, here: dict, part: str) -> bool:
    """Returns whether both are known and differ by more than rounding."""
    ours, theirs = (recorded or {}).get(part), here[part]
    if ours is None or theirs is None:
        return False
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) > TOLERANCE
