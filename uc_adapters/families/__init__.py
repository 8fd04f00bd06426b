"""The base families: `family.py` is the contract, every other file one family. CONTRIBUTING.md tells how to add one."""

from __future__ import annotations

from torch import nn

from ..errors import BaseModelError
from .chameleon import Chameleon
from .emu3 import Emu3
from .family import Family, Geometry, Size
from .janus import Janus

FAMILIES: dict[str, type[Family]] = {"janus": Janus, "emu3": Emu3, "chameleon": Chameleon}  # by the config's model_type

__all__ = ["FAMILIES", "Family", "Geometry", "Size", "family_of"]


def family_of(base: nn.Module) -> Family:
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
    missing = [name for name in family.module_names.values() if name not in names]
    if missing:
        raise BaseModelError(
            f"{type(base).__name__} lacks {', '.join(missing)}, expected of the family {model_type!r}. "
            f"Load the base with {family.model_class}.from_pretrained, not a part of it."
        )
    return family(base)
