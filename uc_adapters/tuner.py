"""The PEFT tuner: LoRA in the language model, and a layer around each module at which the adapter compresses."""

from __future__ import annotations

from itertools import product
from pathlib import PureWindowsPath

import torch
from accelerate.utils import align_module_device
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import UniCompressConfig
from .errors import AdapterFileError, AdapterNameError, BaseModelError, ConfigError, UnsupportedError
from .families import Family, Geometry, family_of
from .identity import identify
from .lora import ReversibleLora, is_of
from .tuner_layers import CONTAINER, ONE_ANSWER, UniCompressLayer, layer_classes

WRAPPED = "_orig_mod"  # torch.compile's name for the module that it wraps


class UniCompressTuner(ReversibleLora):
    """A LoRA tuner that also puts `UniCompressLayer`s around modules of the base. Both kinds of layer are tuner layers."""

    prefix = "lora_"
    tuner_layer_cls = BaseTunerLayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """Checks that the base can carry the adapter, records the base in its config, and then lets PEFT inject the layers.

        Raises:
            BaseModelError: The base has no known family, lacks a module, or has a part that `torch.compile` wrapped; the stride
                does not divide its grid, or there are several and images have any size; an image has fewer codes than
                `codes_per_step`; or it is another base than the one the adapter was made for (`uc_adapters.identity`).
            ConfigError: `target_modules` matches an embedding, or nothing in the language model.
            AdapterNameError: PEFT cannot hold the name.
        """
        _check_not_compiled(model)
        family = family_of(model)
        config = self.peft_config[adapter_name]
        _check_grid(config, family.geometry)
        _check_names(adapter_name, list(self.peft_config), model, config, family)
        self.forget_what_trains(adapter_name)
        with self.unmerged():  # the fingerprint and DoRA's norms need the base's own weights, not merged ones
            identify(config, family)
            if config.target_modules is None:
                config.target_modules = set(family.target_modules)
            self._family = family
            self._check_targets(config, model)
            super().inject_adapter(model, adapter_name, *args, **kwargs)

    @property
    def _layer_classes(self) -> dict[str, type[UniCompressLayer]]:
        """The class of our layer around a module, by the module's path."""
        return {self._family.module_names[role]: layer for role, layer in layer_classes(self._family).items()}

    def _check_targets(self, config: UniCompressConfig, model: nn.Module) -> None:
        # Our own layers always match, so PEFT would never raise its "no target module found"
        if not config.target_modules or config.target_modules == "all-linear":
            return
        language_model = self._family.module_names["language model"] + "."
        inside = [(name, module) for name, module in model.named_modules() if name.startswith(language_model)]
        targets = [(name, module) for name, module in inside if self._check_target_module_exists(config, name)]
        embeddings = [name for name, module in targets if isinstance(module, nn.Embedding)]
        if embeddings:
            raise ConfigError(
                f"target_modules={config.target_modules!r} matches {embeddings[0]!r}, an embedding; expected linear layers: an "
                "adapter never changes the base's embeddings. Name linear layers, or leave it None."
            )
        if not targets:
            raise ConfigError(
                f"target_modules={config.target_modules!r} matches nothing under {language_model[:-1]!r}; expected names "
                "or a pattern of its linear layers, None for all of them, or [] for no LoRA."
            )

    def _prepare_adapter_config(self, peft_config: LoraConfig, model_config: dict) -> LoraConfig:
        return peft_config  # `inject_adapter` has set `target_modules`; LoraModel would look it up by model type

    def _check_target_module_exists(self, peft_config: UniCompressConfig, key: str):
        """Matches modules that get our layers, and LoRA's targets in the language model, but never in vision tower or VQ."""
        if key in self._layer_classes:
            return True
        if not key.startswith(self._family.module_names["language model"] + ".") or not peft_config.target_modules:
            return False
        return LoraModel._check_target_module_exists(peft_config, key)

    def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key, **kwargs) -> None:
        layer = self._layer_classes.get(current_key)
        if layer is None:
            layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            with align_module_device(layer):  # LoRA of an offloaded layer goes to the device where the layer computes
                super()._create_and_replace(config, adapter_name, target, target_name, parent, current_key, **kwargs)
            return
        if not isinstance(target, UniCompressLayer):
            target = layer(target, self._family)
            setattr(parent, target_name, target)
        target.add_adapter(adapter_name, target.module_class(config, self._family.geometry))
        if adapter_name not in self.active_adapters:
            target.set_requires_grad(adapter_name, False)  # as PEFT does for an adapter that is added and not active

    def _enable_peft_forward_hooks(self, *args, **kwargs):
        """Runs around every forward and `generate`. Raises UnsupportedError if images would be repeated wrongly."""
        if self._family.shared_vocabulary and kwargs.get("pixel_values") is not None:
            for name in ("num_beams", "num_return_sequences"):
                if (kwargs.get(name) or getattr(kwargs.get("generation_config"), name, None) or 1) > 1:
                    raise UnsupportedError(ONE_ANSWER.format(f"{name} above 1"))
        return super()._enable_peft_forward_hooks(*args, **kwargs)

    def _check_merge_allowed(self) -> None:
        raise UnsupportedError(
            "A UniCompress adapter changes the length of the sequence, so it cannot be merged into the base for good. Keep it "
            "attached, and merge only its LoRA for speed with model.merge_adapter(); or remove it with model.unload()."
        )

    def add_weighted_adapter(self, *args, **kwargs):
        """Raises UnsupportedError, since compression modules cannot be averaged, only LoRA can."""
        raise UnsupportedError(
            "Compression modules cannot be averaged, so UniCompress adapters cannot be combined. Train one adapter on both "
            "kinds of data, or switch between two with model.set_adapter(name)."
        )

    def merge_and_unload(self, *args, **kwargs):
        """Raises UnsupportedError, since a shorter sequence has no merged form."""
        self._check_merge_allowed()

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Removes the adapter's name from a key.

        PEFT removes it only directly before the last part, but our modules nest deeper. A compiled part adds `_orig_mod`, which
        is removed, too.
        """
        key = key.replace("_orig_mod.", "")
        named, plain = f".{CONTAINER}.{adapter_name}.", f".{CONTAINER}."
        if named in key:
            return key.replace(named, plain, 1)
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, *args, **kwargs):
        """Returns PEFT's state dict with `.weight` in the keys of DoRA's magnitudes; transformers needs it to load them."""
        state_dict = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        short = f".lora_magnitude_vector.{adapter_name}"
        return {f"{key}.weight" if key.endswith(short) else key: value for key, value in state_dict.items()}

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """Maps the keys as PEFT does. Raises AdapterFileError if a weight is missing, surplus or wrong."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        if any(isinstance(module, BaseTunerLayer) and adapter_name in module.merged_adapters for module in model.modules()):
            raise UnsupportedError(
                f"Adapter {adapter_name!r} is merged, so loading new weights would have no effect; expected an unmerged "
                "adapter. Call unmerge_adapter() first."
            )
        expected = {key: value.shape for key, value in model.state_dict().items() if is_of(key, adapter_name)}
        problems = [
            *_listed("missing", [key for key in expected if key not in remapped]),
            *_listed("surplus", [key for key in remapped if key not in expected]),
            *_listed(
                "of the wrong shape",
                [
                    f"{key} is {tuple(value.shape)}, expected {tuple(expected[key])}"
                    for key, value in remapped.items()
                    if key in expected and value.shape != expected[key]
                ],
            ),
            *_listed("not finite", [key for key, value in remapped.items() if not torch.isfinite(value).all()]),
        ]
        if problems:
            raise AdapterFileError(
                f"The weights of adapter {adapter_name!r} do not fit its config: {'; '.join(problems)}. "
                "The file was damaged or belongs to another config: fetch or save the adapter again."
            )
        return remapped


def _listed(what: str, entries: list[str]) -> list[str]:
    """Returns a phrase with the number of entries and the first three, in a list; an empty list without entries."""
    if not entries:
        return []
    more = f" and {len(entries) - 3} more" if len(entries) > 3 else ""
    return [f"{len(entries)} {what} ({', '.join(entries[:3])}{more})"]


def detach(base: nn.Module) -> None:
    """Removes every tuner layer from a base, as `unload` does, when there is no tuner."""
    for name, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer):
            uncover(base, name, module)
    if hasattr(base, "peft_config"):
        del base.peft_config


def uncover(base: nn.Module, name: str, layer: BaseTunerLayer) -> None:
    """Puts the base's own module back in place of the tuner layer around it."""
    parent, _, child = name.rpartition(".")
    ours = isinstance(layer, UniCompressLayer)
    setattr(base.get_submodule(parent), child, layer.unload_and_optionally_merge_module() if ours else layer.get_base_layer())


def _check_names(new: str, names: list[str], model: nn.Module, config: UniCompressConfig, family: Family) -> None:
    """Raises AdapterNameError if PEFT cannot hold an adapter's name.

    PEFT finds an adapter's keys by its name as a path segment, so it would take a module of the same name for the adapter. The
    names of older adapters are checked too, since the new adapter may add a module with such a name.
    """
    with torch.device("meta"):
        modules = [layer.module_class(config, family.geometry) for layer in layer_classes(family).values()]
    taken = _path_segments(model) - (set(names) - {new})  # the older adapters' own containers are not taken
    taken = taken.union(*map(_path_segments, modules), {"base_layer", "base_model", CONTAINER, "lora_A", "lora_B"})
    bad = [  # an absolute path would be saved outside its folder
        name for name in names if not name or "." in name or name in "lora_" or name in taken or PureWindowsPath(name).anchor
    ]
    if bad:
        raise AdapterNameError(
            f"adapter_name={bad[0]!r} does not work in PEFT; expected a non-empty name without dots that is no absolute path, "
            "no part of 'lora_' and no module's name on the path to a weight. Choose another, such as 'default' or 'uc4x'."
        )


def _check_not_compiled(model: nn.Module) -> None:
    """Raises BaseModelError if torch.compile wraps a module. That renames weights, so adapters could not be loaded."""
    wrapped = next((path for path, _ in model.named_modules() if WRAPPED in path.split(".")), None)
    if wrapped is not None:
        holder = wrapped.partition(WRAPPED)[0].rstrip(".")
        raise BaseModelError(
            f"{f'The base module {holder!r}' if holder else 'The base'} is wrapped by torch.compile(...), which renames its "
            "weights; expected an unwrapped module. Attach the adapter first, then call model = torch.compile(model). Or "
            "compile in place with module.compile(), which renames nothing."
        )


def _path_segments(module: nn.Module) -> set[str]:
    """Returns all parts of the parameters' paths."""
    return {segment for path, _ in module.named_parameters() for segment in path.split(".")}


def _check_grid(config: UniCompressConfig, geometry: Geometry) -> None:
    if geometry.image_size is None:  # the processor chooses sizes that the stride divides
        if len(config.strides) > 1:
            raise BaseModelError(
                f"stride={config.stride} for a {geometry.model_type} base, whose images have any size; expected one integer: "
                "its processor chooses sizes that the stride divides. Several are for bases whose images have one size."
            )
        return
    for side, stride in product({geometry.read_side, geometry.draw_side}, config.strides):
        if side % stride:
            legal = [s for s in range(1, side + 1) if side % s == 0]
            raise BaseModelError(f"stride={stride} does not divide the base's {side} x {side} grid; expected one of {legal}.")
    codes = geometry.draw_side**2
    if max(config.strip_lengths) > codes:
        raise BaseModelError(
            f"codes_per_step={config.codes_per_step} for a base whose images have {codes} codes; expected 1 to {codes}."
        )
