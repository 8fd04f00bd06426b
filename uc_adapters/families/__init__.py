"""The base families: `family.py` is the contract, every file with a `model_type` a family. CONTRIBUTING.md: how to add one."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from torch import nn
from transformers import ProcessorMixin

from ..errors import BaseModelError, InputError
from .family import Family, Geometry, Size

_CLASSES = [
    member
    for file in pkgutil.iter_modules(__path__)
    for member in vars(import_module(f"{__name__}.{file.name}")).values()
    if isinstance(member, type) and issubclass(member, Family) and "model_type" in vars(member)
]
FAMILIES: dict[str, type[Family]] = {family.model_type: family for family in _CLASSES}

__all__ = ["FAMILIES", "Family", "Geometry", "Size", "family_of", "family_of_processor"]


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


def family_of_processor(processor: ProcessorMixin) -> type[Family]:
    """The family whose inputs a processor prepares.

    Raises:
        InputError: No family for it.
    """
    names = [parent.__name__ for parent in type(processor).__mro__]
    family = next((family for family in FAMILIES.values() if family.processor_class in names), None)
    if family is None:
        expected = ", ".join(sorted(family.processor_class for family in FAMILIES.values()))
        raise InputError(f"No family for a processor of type {names[0]}; expected {expected}, as the base was published with.")
    return family
