"""The base families: each class with a `model_type`. `family.py` is their interface; CONTRIBUTING.md shows how to add one."""

from __future__ import annotations

import pkgutil
from importlib import import_module

import transformers
from torch import nn
from transformers import ProcessorMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from ..errors import BaseModelError, InputError
from .family import Family, Geometry, Size

_CLASSES: list[type[Family]] = []
# The files, named as model types, that import what the installed transformers does not have yet, each with its error
ABSENT: dict[str, str] = {}

for _file in pkgutil.iter_modules(__path__):
    try:
        _members = vars(import_module(f"{__name__}.{_file.name}")).values()
    except ImportError as error:
        if error.name != "transformers":
            raise
        ABSENT[_file.name] = str(error)
        continue
    _CLASSES += [x for x in _members if isinstance(x, type) and issubclass(x, Family) and "model_type" in vars(x)]
FAMILIES: dict[str, type[Family]] = {family.model_type: family for family in _CLASSES}

__all__ = ["FAMILIES", "Family", "Geometry", "Size", "check_present", "family_of", "family_of_processor", "make_loadable"]


def family_of(base: nn.Module) -> Family:
    """Returns the family of a base model. The `model_type` of the base's config decides.

    Raises:
        BaseModelError: There is no family for the base (the message names the supported ones), or a module that the family
            needs is missing, in the base or in the installed transformers.
    """
    model_type = getattr(getattr(base, "config", None), "model_type", None)
    check_present(model_type)
    if model_type not in FAMILIES:
        raise BaseModelError(
            f"No family for a base of type {model_type!r} ({type(base).__name__}); supported: "
            f"{', '.join(sorted(FAMILIES))}. Load a supported base, or add a family (CONTRIBUTING.md)."
        )
    family = FAMILIES[model_type]
    names = dict(base.named_modules())
    missing = [name for name in family.module_names.values() if name not in names]
    if missing:
        raise BaseModelError(
            f"{type(base).__name__} lacks {', '.join(missing)}; expected the whole {model_type!r} model. "
            f"Load it with {family.model_class}.from_pretrained."
        )
    return family(base)


def check_present(model_type: str | None) -> None:
    """Raises BaseModelError if there is a family for bases of this type, and the installed transformers is too old for it."""
    if model_type in ABSENT:
        raise BaseModelError(
            f"A base of type {model_type!r} needs a newer transformers than {transformers.__version__}: {ABSENT[model_type]}. "
            "Upgrade it: pip install -U transformers."
        )


def make_loadable(model_type: str | None) -> None:
    """Lets AutoModelForImageTextToText load a family's base, if transformers itself maps its config to no class with a head."""
    if model_type in FAMILIES and model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        model_class = getattr(transformers, FAMILIES[model_type].model_class)
        transformers.AutoModelForImageTextToText.register(model_class.config_class, model_class, exist_ok=True)


def family_of_processor(processor: ProcessorMixin) -> type[Family]:
    """Returns the family whose inputs a processor prepares.

    Raises:
        InputError: There is no family for the processor.
    """
    names = [parent.__name__ for parent in type(processor).__mro__]
    family = next((family for family in FAMILIES.values() if family.processor_class in names), None)
    if family is None:
        expected = ", ".join(sorted(family.processor_class for family in FAMILIES.values()))
        raise InputError(f"No family for a processor of type {names[0]}; expected {expected}. Load the base's own processor.")
    return family
