"""The base families. A family tells which module plays which role, and how codes map to embeddings and back.

To add one: a short file like `janus.py` with a class of the same attributes and methods, and a line in `FAMILIES`.
"""

from __future__ import annotations

from torch import nn

from ..errors import BaseModelError
from .janus import Geometry, Janus

FAMILIES = {"janus": Janus}

__all__ = ["FAMILIES", "Geometry", "Janus", "family_of"]


def family_of(base: nn.Module) -> Janus:
    """The family of a base model, by its config's `model_type`.

    Raises:
        BaseModelError: No family for it (names the supported ones), or a module that the family needs is missing.
    """
    model_type = getattr(getattr(base, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        raise BaseModelError(
            f"No family for a base of type {model_type!r} ({type(base).__name__}); supported: "
            f"{', '.join(sorted(FAMILIES))}. CONTRIBUTING.md tells how to add a family."
        )
    family = FAMILIES[model_type]
    names = dict(base.named_modules())
    missing = [name for name in family.roles.values() if name not in names]
    if missing:
        raise BaseModelError(
            f"{type(base).__name__} lacks {', '.join(missing)}, expected of the family {model_type!r}. "
            f"Load the base with {family.model_class}.from_pretrained, not a part of it."
        )
    return family(base)
