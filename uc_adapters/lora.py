"""LoRA whose merging can be undone bit for bit, and that keeps which weights train when adapters are switched."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import psutil
import torch
from peft.tuners.lora import Linear, LoraLayer, LoraModel
from torch import nn

from .errors import UnsupportedError
from .tuner_layers import CONTAINER

_MERGING = RLock()  # threads that share a base would take merged weights for its own

MERGEABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class ReversibleLora(LoraModel):
    """A `LoraModel` that unmerges exactly, and that keeps for each adapter which of its weights train."""

    def __init__(self, *args, **kwargs):
        self._own: dict[Linear, dict[str, nn.Parameter]] = {}  # the base's own parameters, where LoRA is merged
        self._trains: dict[str, set[str]] = {}  # which of an adapter's weights trained when it was last active
        super().__init__(*args, **kwargs)

    # What trains ------------------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activates an adapter as PEFT does, but the same of its weights train as when it was last active. PEFT would train
        all.

        If the adapter was never active, all of its weights train; none, if it was loaded for inference.

        Args:
            adapter_name: The adapter to activate. A merged adapter is unmerged first.
            inference_mode: Whether to freeze all of its weights. Default False.
        """
        self.unmerge_adapter()
        for name in self.active_adapters:
            self._remember_what_trains(name)
        super().set_adapter(adapter_name, inference_mode)
        if not inference_mode:
            for name in self.active_adapters:
                self._restore_what_trains(name)

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Sets `requires_grad` as PEFT does. For an inactive adapter, the choice takes effect when it is activated."""
        super().set_requires_grad(adapter_names, requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._remember_what_trains(name)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        """Enables or disables the adapters; `requires_grad` is kept. PEFT would freeze all, then train all active weights."""
        if not enabled:
            self.unmerge_adapter()
        trained = [(weight, weight.requires_grad) for weight in self.parameters()]
        super()._enable_adapter_layers(enabled)
        for weight, trains in trained:
            weight.requires_grad_(trains)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter as PEFT does. An adapter that becomes active instead trains as described in `set_adapter`."""
        was_active = adapter_name in self.active_adapters
        if was_active:
            self.unmerge_adapter()
        super().delete_adapter(adapter_name)
        self.forget_what_trains(adapter_name)
        if was_active:
            for name in self.active_adapters:
                self._restore_what_trains(name)

    def _weights(self, adapter_name: str) -> list[tuple[str, nn.Parameter]]:
        return [(path, weight) for path, weight in self.named_parameters() if is_of(path, adapter_name)]

    def forget_what_trains(self, adapter_name: str) -> None:
        """Forgets which weights of this adapter trained. Called when the name becomes free, or is taken by a new adapter."""
        self._trains.pop(adapter_name, None)

    def _remember_what_trains(self, adapter_name: str) -> None:
        self._trains[adapter_name] = {path for path, weight in self._weights(adapter_name) if weight.requires_grad}

    def _restore_what_trains(self, adapter_name: str) -> None:
        nothing = set() if self.peft_config[adapter_name].inference_mode else None
        trains = self._trains.get(adapter_name, nothing)
        if trains is not None:
            for path, weight in self._weights(adapter_name):
                weight.requires_grad_(path in trains)

    # Merging ----------------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = True) -> None:
        """Adds the active adapter's LoRA to the weights of the language model. The compression modules are not changed.

        The outputs stay the same, up to rounding, and LoRA's own multiplications are saved. The base's weights are not
        written to: each merged layer gets a second weight, and `unmerge_adapter` puts the base's own parameter back. So merging
        needs extra memory, as much as the layers that LoRA targets. Calls that need the base's own weights unmerge first:
        `set_adapter`, `disable_adapter`, `unload`, deleting the merged adapter, and `train()`.

        Args:
            adapter_names: A list with the name of the active adapter only. Default: the active adapter.
            safe_merge: PEFT's argument. It has no effect: weights are always merged in a copy and checked.

        Raises:
            UnsupportedError: The adapter is not the active one, or is disabled, or the model is in training mode; or a layer
                cannot be merged, since its base is quantised or offloaded, or the merged weight is not finite. Then nothing is
                merged.
        """
        with _MERGING:
            layers = self._mergeable_layers(adapter_names)
            try:
                for layer in layers:
                    self._merge(layer)
            except (NotImplementedError, RuntimeError, ValueError) as error:
                self.unmerge_adapter()
                raise UnsupportedError(
                    f"Adapter {self.active_adapters[0]!r} cannot be merged: {type(error).__name__}: {str(error).rstrip('.')}. "
                    "The base is unchanged. Use the adapter unmerged."
                ) from error

    def _merge(self, layer: Linear) -> None:
        """Merges one layer. PEFT merges into a new parameter, not into the base's own."""
        base_layer = layer.get_base_layer()
        own = dict(base_layer.named_parameters(recurse=False))
        self._own[layer] = own
        # What is made in a caller's inference mode could not be differentiated through later
        with torch.inference_mode(any(parameter.is_inference() for parameter in own.values())):
            for name, parameter in own.items():
                setattr(base_layer, name, nn.Parameter(parameter.data, parameter.requires_grad))
            layer.merge(safe_merge=True)

    def unmerge_adapter(self) -> None:
        """Puts the base's own parameters back. Does nothing if nothing is merged."""
        with _MERGING:
            for layer, parameters in self._own.items():
                base_layer = layer.get_base_layer()
                for name, parameter in parameters.items():
                    merged = getattr(base_layer, name)
                    parameter.data = parameter.data.to(merged.device, merged.dtype)  # the model may have moved meanwhile
                    setattr(base_layer, name, parameter)
                layer.merged_adapters.clear()
                layer._caches.clear()  # PEFT caches DoRA's norms here for its own unmerge
            self._own.clear()

    @contextmanager
    def merged_adapter(self) -> Iterator[None]:
        """Merges the active adapter while the context is open, see `merge_adapter`. If it was merged before, it stays merged.

        Example:
            with model.merged_adapter():
                tokens = model.generate(**inputs, generation_mode="image")
        """
        was_merged = bool(self._own)
        self.merge_adapter()
        try:
            yield
        finally:
            if not was_merged:
                self.unmerge_adapter()

    def merge_if_room(self) -> None:
        """Merges the active adapter if the second copy of the layers that LoRA targets takes at most half of the free memory.

        What draws for a user calls it. Merged, the adapter draws faster on every device. Most is gained on a GPU, where
        launching LoRA's kernels takes longer than a step of the base. A model that cannot be merged is left as it is, with a
        warning: no room, a quantised or offloaded base, one in training mode.
        """
        try:
            with _MERGING:
                self._check_room()
                self.merge_adapter()
        except UnsupportedError as error:
            warnings.warn(f"Drawing with LoRA unmerged, which is slower. {error}", stacklevel=2)

    def _check_room(self) -> None:
        """Raises UnsupportedError if merging takes more than half of a device's free memory, or cannot be done."""
        needed: Counter[torch.device] = Counter()
        for layer in self._mergeable_layers(None):
            for weight in layer.get_base_layer().parameters(recurse=False):
                needed[weight.device] += weight.nbytes
        for device, count in needed.items():
            if count > (free := free_memory(device)) / 2:
                raise UnsupportedError(
                    f"Merging takes {count / 1e9:.1f} GB more, and {free / 1e9:.1f} GB of {device} memory are free; "
                    "expected at most half of it. Free memory, or call merge_adapter() to merge nevertheless."
                )

    @contextmanager
    def unmerged(self) -> Iterator[None]:
        """Restores the base's own weights while the context is open. Then merges the adapter again if it is still active."""
        merged = self.active_adapters if self._own else None
        self.unmerge_adapter()
        try:
            yield
        finally:
            if merged is not None and merged == self.active_adapters and not self.model.training:
                self.merge_adapter()

    def train(self, mode: bool = True) -> ReversibleLora:
        """Sets the training mode. A merged adapter is unmerged first, with a warning, since merged LoRA gets no gradient."""
        if mode and self._own:
            warnings.warn("train() unmerged the adapter: while it is merged, LoRA gets no gradient.", stacklevel=2)
            self.unmerge_adapter()
        return super().train(mode)

    def unload(self) -> nn.Module:
        """Removes the adapters and returns the base, with its own weights."""
        self.unmerge_adapter()
        return super().unload()

    def _mergeable_layers(self, adapter_names: list[str] | None) -> list[Linear]:
        """Returns the layers that are not merged yet. Raises UnsupportedError if a layer cannot be merged."""
        active = self.active_adapters
        if len(active) != 1 or (adapter_names is not None and list(adapter_names) != active):
            raise UnsupportedError(
                f"merge_adapter({adapter_names!r}) with {active!r} active; expected one active adapter, and its name or "
                "None: an image has one compact form. Choose the adapter with model.set_adapter(name)."
            )
        layers = [layer for layer in self.model.modules() if isinstance(layer, LoraLayer) and active[0] in layer.lora_A]
        if any(layer.disable_adapters for layer in layers):
            raise UnsupportedError("The adapter is disabled; expected an enabled adapter. Enable it before merging.")
        if self.model.training:
            raise UnsupportedError(
                "The model is in training mode, and a merged adapter cannot be trained; expected model.eval() before merging."
            )
        for layer in layers:
            base_layer = layer.get_base_layer()
            weight = getattr(base_layer, "weight", None)
            plain = type(layer) is Linear and type(weight) is nn.Parameter and weight.dtype in MERGEABLE
            if not plain:  # PEFT has its own LoRA layer classes for most quantised layers
                held = "no weight" if weight is None else f"{type(weight).__name__} of {weight.dtype}"
                raise UnsupportedError(
                    f"A base layer {type(base_layer).__name__} holds {held}, which has no exact merged form; expected a "
                    "base that is not quantised. Use the adapter unmerged, or load the base unquantised."
                )
            if weight.is_meta:
                raise UnsupportedError(
                    "Weights of the base are offloaded; expected all of the language model in memory. Load the base without "
                    "offloading, or use the adapter unmerged."
                )
        return [layer for layer in layers if layer not in self._own]


def free_memory(device: torch.device) -> int:
    """Bytes that a device can still give."""
    backend = torch.get_device_module(device)
    if hasattr(backend, "mem_get_info"):
        return backend.mem_get_info(device)[0]
    return psutil.virtual_memory().available  # of a CPU, or of a device that shares the CPU's memory


def is_of(path: str, adapter_name: str) -> bool:
    """Whether a weight belongs to an adapter."""
    return f".{CONTAINER}.{adapter_name}." in path or (".lora_" in path and f".{adapter_name}." in path)
