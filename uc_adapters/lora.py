"""LoRA that can be undone: unmerged weights are the base's own, bit for bit, and switching changes nothing that trains."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import Linear, LoraLayer, LoraModel
from torch import nn

from .errors import UnsupportedError
from .tuner_layers import CONTAINER

MERGEABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class ReversibleLora(LoraModel):
    """`LoraModel` with an exact way back from merging, and with what trains kept for each adapter."""

    def __init__(self, *args, **kwargs):
        self._own: dict[Linear, dict[str, nn.Parameter]] = {}  # the base's own parameters, where LoRA is merged
        self._trains: dict[str, set[str]] = {}  # which of an adapter's weights trained when it was last active
        super().__init__(*args, **kwargs)

    # What trains ------------------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """PEFT's, except that an adapter trains as it did when it was last active; PEFT would train all of it.

        One that was never active trains as it was loaded: all of it, or nothing of an adapter that was loaded for inference.

        Args:
            adapter_name: The adapter to activate. A merged one is unmerged first.
            inference_mode: Whether to freeze it. Default False: as described above.
        """
        self.unmerge_adapter()
        for name in self.active_adapters:
            self._remember_what_trains(name)
        super().set_adapter(adapter_name, inference_mode)
        if not inference_mode:
            for name in self.active_adapters:
                self._restore_what_trains(name)

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """PEFT's; an adapter that is not active keeps the choice until it is."""
        super().set_requires_grad(adapter_names, requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._remember_what_trains(name)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        """PEFT's, except that it only chooses what computes: PEFT would freeze all, and then train all of what is active."""
        if not enabled:
            self.unmerge_adapter()
        trained = [(weight, weight.requires_grad) for weight in self.parameters()]
        super()._enable_adapter_layers(enabled)
        for weight, trains in trained:
            weight.requires_grad_(trains)

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's; the adapter that takes the place of an active one trains as `set_adapter` says."""
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
        """For a name that is free again, or newly taken."""
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
        """Adds the active adapter's LoRA to the weights of the language model; the compression modules stay as they are.

        The model then computes what it computed, up to rounding, without LoRA's own multiplications. The base's weights are
        not written to: each merged layer gets a second weight, and `unmerge_adapter` puts the base's own parameter back. So
        merging needs as much memory again as the layers that LoRA targets. Whatever needs the base's own weights unmerges
        first: `set_adapter`, `disable_adapter`, `unload`, deleting the merged adapter, and `train()`.

        Args:
            adapter_names: The active adapter, alone in a list. Default: the same.
            safe_merge: PEFT's. Weights are always merged in a copy and checked, so it changes nothing.

        Raises:
            UnsupportedError: The adapter is not the one that is active, or is disabled, or the model is in training mode; or a
                layer cannot be merged: its base is quantised or offloaded, or the merged weight is not finite. Nothing is
                merged then.
        """
        layers = self._mergeable_layers(adapter_names)
        try:
            for layer in layers:
                base_layer = layer.get_base_layer()
                self._own[layer] = dict(base_layer.named_parameters(recurse=False))
                for name, parameter in self._own[layer].items():  # PEFT merges into what it finds here
                    setattr(base_layer, name, nn.Parameter(parameter.data, parameter.requires_grad))
                layer.merge(safe_merge=True)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            self.unmerge_adapter()
            raise UnsupportedError(
                f"Adapter {self.active_adapters[0]!r} cannot be merged: {type(error).__name__}: {str(error).rstrip('.')}. The "
                "base is as it was: use the adapter unmerged."
            ) from error

    def unmerge_adapter(self) -> None:
        """Puts the base's own parameters back. Where nothing is merged, it does nothing."""
        for layer, parameters in self._own.items():
            base_layer = layer.get_base_layer()
            for name, parameter in parameters.items():
                merged = getattr(base_layer, name)
                parameter.data = parameter.data.to(merged.device, merged.dtype)  # the model may have moved meanwhile
                setattr(base_layer, name, parameter)
            layer.merged_adapters.clear()
            layer._caches.clear()  # DoRA's norms, which PEFT keeps for its own way to unmerge
        self._own.clear()

    @contextmanager
    def merged_adapter(self) -> Iterator[None]:
        """The active adapter merged for a while, see `merge_adapter`; it stays merged where it was merged before.

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

    @contextmanager
    def unmerged(self) -> Iterator[None]:
        """The base's own weights for a while; then the adapter is merged again, if it was and is still active."""
        merged = self.active_adapters if self._own else None
        self.unmerge_adapter()
        try:
            yield
        finally:
            if merged is not None and merged == self.active_adapters and not self.model.training:
                self.merge_adapter()

    def train(self, mode: bool = True) -> ReversibleLora:
        """PyTorch's; a merged adapter is unmerged before it trains, with a warning: merged, LoRA would get no gradient."""
        if mode and self._own:
            warnings.warn("train() unmerged the adapter: while it is merged, LoRA gets no gradient.", stacklevel=2)
            self.unmerge_adapter()
        return super().train(mode)

    def unload(self) -> nn.Module:
        """PEFT's: the base itself, with its own weights."""
        self.unmerge_adapter()
        return super().unload()

    def _mergeable_layers(self, adapter_names: list[str] | None) -> list[Linear]:
        """The layers that are to be merged, none where they are already; raises UnsupportedError where one cannot be."""
        active = self.active_adapters
        if len(active) != 1 or (adapter_names is not None and list(adapter_names) != active):
            raise UnsupportedError(
                f"merge_adapter({adapter_names!r}) with {active!r} active; expected one active adapter, and its name or None: "
                "an image has one compact form. Choose it with model.set_adapter(name)."
            )
        layers = [layer for layer in self.model.modules() if isinstance(layer, LoraLayer) and active[0] in layer.lora_A]
        if any(layer.disable_adapters for layer in layers):
            raise UnsupportedError("The adapter is disabled; expected an enabled one. Enable it before you merge it.")
        if self.model.training:
            raise UnsupportedError(
                "The model is in training mode, and a merged adapter cannot be trained; expected model.eval() before merging."
            )
        for layer in layers:
            base_layer = layer.get_base_layer()
            weight = getattr(base_layer, "weight", None)
            plain = type(layer) is Linear and type(weight) is nn.Parameter and weight.dtype in MERGEABLE
            if not plain:  # PEFT has LoRA layers of its own for most quantised ones
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


def is_of(path: str, adapter_name: str) -> bool:
    """Whether a weight belongs to an adapter."""
    return f".{CONTAINER}.{adapter_name}." in path or (".lora_" in path and f".{adapter_name}." in path)
