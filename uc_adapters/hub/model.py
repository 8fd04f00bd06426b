"""A PeftModel whose adapters load from, and save as, complete and checked folders or Hub repos."""

from __future__ import annotations

import copy
import difflib
import inspect
import math
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn
from transformers import AutoProcessor, ProcessorMixin

from ..config import UniCompressConfig
from ..errors import AdapterFileError, BaseModelError, InputError, UnsupportedError
from ..families import family_of
from ..files.folder import CARD_NAME, UNSEALED, find_weights, saving, seal_folder
from ..files.pull import PULL_OPTIONS, pull
from ..identity import identify, name_and_commit
from ..tuner import UniCompressTuner, detach, uncover
from .base import load_base
from .card import CardFacts, local_name, published_as, update_card
from .pipeline_files import pipeline_files
from .push import push_folder

if TYPE_CHECKING:
    from transformers.utils.quantization_config import QuantizationConfigMixin
    from typing_extensions import Self

# Two configs that differ in these fields alone compute the same: they say how weights start and train, or round the base's
OF_TRAINING = {"base_fingerprint", "codebook_weight", "init_lora_weights", "lora_dropout"}


# What PEFT takes from its own `kwargs`
_PEFT_OPTIONS = ("device_map", "max_memory", "offload_dir", "offload_folder", "offload_index", "use_safetensors")
_NOT_SAVED = {
    "save_embedding_layers": "save weights of the base",
    "path_initial_model_for_weight_conversion": "turn LoRA into its difference from an initial adapter, but the base's weights "
    "do not change, so there is nothing to convert",
}


class HubModel(PeftModel):
    """Loads an adapter from a folder or the Hub, and saves it: all of it, or an error says why not."""

    def __init__(self, *args, **kwargs):
        with warnings.catch_warnings():
            # PEFT 0.21 reads an attribute that transformers 5.23 has renamed
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            super().__init__(*args, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module | str | PathLike,
        model_id: str | PathLike | None = None,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: UniCompressConfig | None = None,
        *,
        base_model: nn.Module | str | PathLike | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        dtype: torch.dtype | str | None = None,
        device_map: str | dict | None = None,
        attn_implementation: str | None = None,
        quantization_config: QuantizationConfigMixin | None = None,
        **kwargs,
    ) -> Self:
        """Loads an adapter, and its base if none is given.

        `("org/janus-uc4x")` loads the base that the adapter names, at the commit that it was trained on. With `base_model=`, it
        loads that path or id, or takes that loaded model. `(model, "org/janus-uc4x")` is PEFT's own form. An adapter from the
        Hub is one checked snapshot. After that, only the disk is read. Once cached, it loads offline.

        Args:
            model: The adapter's folder or Hub id; or, with `model_id`, a loaded base.
            model_id: The adapter's folder or Hub id, where `model` is a base.
            adapter_name: Name of the adapter in this model. Default "default".
            is_trainable: Whether the adapter's weights train. Default False.
            config: Overrides the adapter's stored config.
            base_model: The base as a loaded model, a folder or a Hub id. Default: the base that the adapter's config names.
            subfolder: The adapter's subfolder in the folder or repo. Default: the top folder.
            revision: Branch, tag or commit of the adapter's repo. Default: main.
            token: The token for both repos. Default: the token of the login.
            cache_dir: The cache for both repos. Default: the Hub's own cache.
            local_files_only: Send no request for either repo. Default False.
            force_download: Download the adapter again. Default False.
            dtype: The base's dtype, if the base is loaded here. Default: the dtype in the base's config.
            device_map: The base's device map, if the base is loaded here.
            attn_implementation: The base's attention, if the base is loaded here. Default: transformers' choice.
            quantization_config: How to quantise the base, if the base is loaded here. Default: as its config says.
            **kwargs: Passed to `PeftModel.from_pretrained`: `low_cpu_mem_usage`, `autocast_adapter_dtype`, ...

        Raises:
            HubError: The adapter cannot be read from the Hub. The message says whether the repo, the revision, the folder, the
                token or the connection is the reason.
            AdapterFileError: A file is missing or damaged, or does not hold what the config promises.
            ConfigError: The config holds a bad value, or comes from a newer format.
            BaseModelError: The base cannot be loaded, or is not the base that the adapter was trained on.
            InputError: An argument is unknown, or is for the loading of a base that is loaded already.
        """
        _check_known(cls.from_pretrained, kwargs)
        if model_id is None:
            adapter, base = model, base_model
            if isinstance(adapter, nn.Module):
                raise InputError("A base model without an adapter; expected from_pretrained(base, 'adapter folder or id').")
        elif base_model is None:
            adapter, base = model_id, model
        else:
            raise InputError("The base is given twice, by position and as base_model=; expected one of the two.")
        access = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        folder = pull(adapter, subfolder=subfolder, revision=revision, force_download=force_download, **access)
        options = {
            "dtype": dtype,
            "device_map": device_map,
            "attn_implementation": attn_implementation,
            "quantization_config": quantization_config,
        }
        if isinstance(base, nn.Module):
            refuse_carrier(base)
            if given := next((name for name, value in options.items() if value is not None), None):
                raise InputError(
                    f"{given}={options[given]!r} is for the loading of the base, and the base is loaded already; expected it "
                    "in the base's own from_pretrained. Remove it here."
                )
        stored, checked = _read_adapter(folder)
        if not isinstance(base, nn.Module):
            base = load_base(str(adapter), base, stored, options, access)
        if config is None:
            config = stored
        elif config.base_geometry is None:
            config.base_geometry, config.base_fingerprint = stored.base_geometry, stored.base_fingerprint
        with _explained(folder), keeping_dispatch(base):
            try:
                return super().from_pretrained(base, folder, adapter_name, is_trainable, config, _checked=checked, **kwargs)
            except Exception:
                detach(base)  # the caller's base becomes as it was
                raise

    def load_adapter(
        self,
        model_id: str | PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        *,
        _checked: tuple[int, ...] | None = None,
        **kwargs,
    ):
        """PEFT's `load_adapter`, from one checked snapshot. An adapter that fails to load leaves nothing behind.

        If an adapter has that name already, the new weights replace its weights. The configs have to agree.

        Args and errors as in `from_pretrained`; other `kwargs` are passed to PEFT. `_checked` is what `_read_adapter` returned,
        where `from_pretrained` has read and checked the folder.
        """
        if _checked is not None:
            return self._load_weights(model_id, _checked, adapter_name, is_trainable, **kwargs)
        _check_known(self.load_adapter, kwargs)
        folder = pull(model_id, **{name: kwargs.pop(name) for name in PULL_OPTIONS if name in kwargs})
        config, checked = _read_adapter(folder)
        if adapter_name in self.peft_config:
            ours = self.peft_config[adapter_name]
            _check_same(ours, config, adapter_name, folder)
            if config.base_fingerprint != ours.base_fingerprint:  # trained on another base, or on other weights of it
                identify(config, family_of(self.get_base_model()))
        with _explained(folder), self._whole_or_not_there(adapter_name):
            if adapter_name not in self.peft_config:  # PEFT would read and check the config again
                config.inference_mode = not is_trainable
                names = ("low_cpu_mem_usage", "autocast_adapter_dtype")
                self.add_adapter(adapter_name, config, **{name: kwargs[name] for name in names if name in kwargs})
                if is_trainable:
                    self.set_requires_grad(adapter_name)
            return self._load_weights(folder, checked, adapter_name, is_trainable, **kwargs)

    def _load_weights(self, folder: Path, checked: tuple[int, ...], *args, **kwargs):
        """PEFT's `load_adapter` for an adapter whose name is known: it loads the weights alone."""
        result = super().load_adapter(str(folder), *args, **kwargs)
        if _version_of(find_weights(folder)) != checked:
            raise AdapterFileError(
                f"Another process saved into {folder} while it was loaded; expected no change. Load it again."
            )
        return result

    def add_adapter(self, adapter_name: str, peft_config: UniCompressConfig, *args, **kwargs) -> None:
        """PEFT's `add_adapter`. An adapter that cannot be added leaves nothing behind."""
        with self._whole_or_not_there(adapter_name):
            super().add_adapter(adapter_name, peft_config, *args, **kwargs)

    @contextmanager
    def _whole_or_not_there(self, adapter_name: str) -> Iterator[None]:
        """Removes what there is of a new adapter if the block fails."""
        known, trainable = adapter_name in self.peft_config, [weight for weight in self.parameters() if weight.requires_grad]
        try:
            yield
        except Exception:
            if not known:
                self._forget(adapter_name, trainable)
            raise

    def _forget(self, adapter_name: str, trainable: list[nn.Parameter]) -> None:
        """Removes an incomplete adapter, which PEFT's own `delete_adapter` cannot."""
        self.peft_config.pop(adapter_name, None)
        base = self.get_base_model()
        for name, module in list(base.named_modules()):
            if isinstance(module, BaseTunerLayer):
                module.delete_adapter(adapter_name)
                if not module._all_available_adapter_names():  # the layer was added for this adapter
                    uncover(base, name, module)
        for weight in trainable:
            weight.requires_grad_(True)  # PEFT has frozen the other adapters

    def save_pretrained(
        self,
        save_directory: str | PathLike,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        *,
        is_main_process: bool = True,
        processor: ProcessorMixin | None = None,
        base_model: str | None = None,
        card: CardFacts | None = None,
        **kwargs,
    ) -> None:
        """Saves each adapter as a folder that is a complete repo: config, weights, processor and card. All of it, or nothing.

        The written files are loaded before they replace the old ones: a folder that `from_pretrained` would refuse is never
        left. An adapter named "default" is saved in the folder itself, others in subfolders of their names, as PEFT does. The
        card keeps what a person wrote into it.

        Args:
            save_directory: The folder. It is made if there is none.
            safe_serialization: Only True: no pickles are written.
            selected_adapters: Names. Default: all.
            is_main_process: False writes nothing, for training on many processes.
            processor: The base's or the adapter's. It is saved with the adapter's placeholder count. Default: the base's own,
                if it is on this machine; else none is saved.
            base_model: The Hub id of the base, if it was loaded from a folder. Default: the id that it was loaded by.
            card: Facts for the card that the adapter does not know.
            **kwargs: Passed to `PeftModel.save_pretrained`: `state_dict`, ...

        Raises:
            AdapterFileError: The folder cannot be written, or the written files do not load as this adapter. The folder stays
                as it was.
            AdapterNameError: No adapter is left to save.
            UnsupportedError: `safe_serialization=False`, `save_embedding_layers=True`, or
                `path_initial_model_for_weight_conversion`.
        """
        if not safe_serialization:
            raise UnsupportedError("safe_serialization=False would write a pickle; expected True: only safetensors are loaded.")
        for option, effect in _NOT_SAVED.items():
            if (value := kwargs.pop(option, None)) not in (None, False, "auto"):
                raise UnsupportedError(f"{option}={value!r} would {effect}; expected None.")
        if not is_main_process:
            return
        if kwargs.get("state_dict") is not None:  # torch.compile(model) has the same weights under longer names
            kwargs["state_dict"] = {key.removeprefix("_orig_mod."): value for key, value in kwargs["state_dict"].items()}
        _ = self.active_peft_config  # raises where no adapter is left
        for name in selected_adapters or list(self.peft_config):
            subfolder = "" if name == "default" else name  # as PEFT does
            folder = Path(save_directory, subfolder)
            with saving(Path(save_directory)) as stage:
                super().save_pretrained(str(stage), selected_adapters=[name], save_embedding_layers=False, **kwargs)
                saved = stage / subfolder
                if own := self._processor_of(name, processor):
                    own.save_pretrained(saved)
                    for file, text in pipeline_files(family_of(self.get_base_model()).model_type).items():
                        (saved / file).write_text(text, "utf-8")
                seal_folder(saved, base_model)
                self._check_saved(saved, name)
                if (folder / CARD_NAME).is_file():
                    shutil.copy(folder / CARD_NAME, saved)
                update_card(saved, card or CardFacts(), published_as(saved) or local_name(folder))

    def _check_saved(self, saved: Path, name: str) -> None:
        """Loads the written files onto a base without weights; raises AdapterFileError unless they are this adapter."""
        base = self.get_base_model()
        with torch.device("meta"):
            plain = getattr(transformers, family_of(base).model_class)(copy.deepcopy(base.config))
        try:
            config = UniCompressConfig.from_pretrained(saved)
            loaded = type(self)(plain, config, name, low_cpu_mem_usage=True)
            UniCompressTuner._remap_adapter_state_dict_for_load(loaded, config, name, load_file(find_weights(saved)))
        except ValueError as error:
            raise AdapterFileError(
                f"Adapter {name!r} is not saved: what was written could not be loaded again. {error} Nothing was changed."
            ) from error
        ours, theirs = _scalings(base, name), _scalings(plain, name)
        differing = [path for path in theirs if not math.isclose(ours[path], theirs[path], rel_tol=1e-6)]
        if differing:
            path = differing[0]
            raise AdapterFileError(
                f"Adapter {name!r} is not saved: its LoRA is scaled by {ours[path]:.6g} in {path} and {len(differing) - 1} "
                f"more modules; expected {theirs[path]:.6g}, which its config gives and a load would use. Set the scale back "
                "(set_scale, unscale_layer), or change lora_alpha and attach anew. Nothing was changed."
            )

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Does nothing: PEFT's card names another library and loses the base. `save_pretrained` writes ours."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        processor: ProcessorMixin | None = None,
        base_model: str | None = None,
        card: CardFacts | None = None,
        **kwargs,
    ) -> str:
        """Pushes the active adapter as a repo of its own, in one commit. `push_folder` pushes a saved folder.

        Args:
            repo_id: "org/name". The repo is made if there is none.
            processor: As in `save_pretrained`.
            base_model: As in `save_pretrained`. It is needed if the base was loaded from a folder.
            card: As in `save_pretrained`.
            **kwargs: `private`, `revision`, `create_pr`, `commit_message` and `token`, as in `uc_adapters.push_folder`.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            AdapterFileError, BaseModelError, HubError: As in `uc_adapters.push_folder`.
        """
        name = self.active_adapter
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory, selected_adapters=[name], processor=processor, base_model=base_model, card=card)
            return push_folder(Path(directory, "" if name == "default" else name), repo_id, card=card, **kwargs)

    def _processor_of(self, adapter_name: str, processor: ProcessorMixin | None) -> ProcessorMixin | None:
        """Returns a copy of the processor with the adapter's placeholder count."""
        name, commit = name_and_commit(self.get_base_model())
        if processor is None and name is not None:
            with suppress(OSError, ValueError):  # the base has none on this machine, and none is fetched
                processor = AutoProcessor.from_pretrained(name, revision=commit, local_files_only=True)
        if processor is None:
            return None
        config = self.peft_config[adapter_name]
        return family_of(self.get_base_model()).compact_processor(processor, config.read_stride(), config.num_global_tokens)


def _check_known(method: Callable, kwargs: dict[str, object]) -> None:
    """Raises InputError for an argument that neither the method nor PEFT knows, since PEFT silently ignores it."""
    signatures = [inspect.signature(of) for of in (method, PeftModel.from_pretrained, PeftModel.load_adapter)]
    known = {*PULL_OPTIONS, *_PEFT_OPTIONS}.union(*(signature.parameters for signature in signatures)) - {"kwargs"}
    for name in kwargs:
        if name not in known:
            close = difflib.get_close_matches(name, known, 2)
            raise InputError(
                f"{name}={kwargs[name]!r} is unknown; expected {' or '.join(close) or 'arguments that the docstring names'}. "
                "Correct the name, or remove it."
            )


def _scalings(base: nn.Module, name: str) -> dict[str, float]:
    """Returns the scaling of LoRA's product in each module."""
    return {
        path.replace("_orig_mod.", ""): float(module.scaling[name])
        for path, module in base.named_modules()
        if isinstance(module, LoraLayer) and name in module.scaling
    }


def refuse_carrier(base: nn.Module) -> None:
    """Raises BaseModelError if a base has an adapter already, or is not a model."""
    if not isinstance(base, nn.Module):
        raise BaseModelError(
            f"base={base!r} is a {type(base).__name__}; expected a loaded model: "
            "AutoModelForImageTextToText.from_pretrained(...)."
        )
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise BaseModelError(
            "The base carries an adapter already; expected a plain base. Add a second adapter with model.add_adapter(name, "
            "config) or model.load_adapter(folder, name), or remove the first with model.unload()."
        )


@contextmanager
def keeping_dispatch(base: nn.Module) -> Iterator[None]:
    """Hides a base's device map from PEFT, which would replace it by a guess, and write offloaded weights to disk again."""
    device_map = base.__dict__.pop("hf_device_map", None)
    try:
        yield
    finally:
        if device_map is not None:
            base.hf_device_map = device_map


def _read_adapter(folder: Path) -> tuple[UniCompressConfig, tuple[int, ...]]:
    """Reads and checks an adapter once; returns its config, and the version of the weights file that was checked."""
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    checked = _version_of(weights) if weights.exists() else ()
    config = UniCompressConfig.from_pretrained(folder)
    find_weights(folder)
    return config, checked


def _version_of(file: Path) -> tuple[int, ...]:
    """Returns numbers that differ once another process has replaced the file."""
    stat = file.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _check_same(ours: UniCompressConfig, stored: UniCompressConfig, adapter_name: str, folder: Path) -> None:
    """Raises AdapterFileError if two configs differ: PEFT would load the weights, and keep the config that is there."""
    ours, stored = (
        {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
        for config in (ours, stored)
    )
    free = UNSEALED | OF_TRAINING
    differing = [name for name in sorted(stored) if name not in free and stored[name] != ours.get(name)]
    if differing:
        told = ", ".join(f"{name} {ours.get(name)} here, {stored[name]} there" for name in differing)
        raise AdapterFileError(
            f"The adapter in {folder} is not of the form of {adapter_name!r}: {told}. Load it under another name, or remove "
            f"that one with delete_adapter({adapter_name!r})."
        )


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turns PEFT's errors about a config's values into an AdapterFileError."""
    try:
        yield
    except (TypeError, ValueError, KeyError, AttributeError, re.error) as error:
        if type(error).__module__ == AdapterFileError.__module__:  # one of ours says it better
            raise
        raise AdapterFileError(
            f"The adapter in {folder} could not be attached: {type(error).__name__}: {error}. Its config holds a value that "
            "PEFT refuses (fetch or save it again), or parts of the base are not in memory."
        ) from error
