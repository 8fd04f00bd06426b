"""A PeftModel whose adapters load and save as whole, verified repos."""

from __future__ import annotations

import copy
import math
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from transformers import AutoProcessor, ProcessorMixin

from ..config import UniCompressConfig
from ..errors import AdapterFileError, BaseModelError, InputError, UnsupportedError
from ..families import family_of
from ..files.folder import CARD_NAME, UNSEALED, find_weights, locked, read_config, saving, seal_folder
from ..files.pull import pull
from ..identity import identify, name_and_commit
from ..tuner import UniCompressTuner, detach, uncover
from .base import load_base
from .card import CardFacts, local_name, published_as, update_card
from .pipeline_files import pipeline_files
from .push import push_folder

if TYPE_CHECKING:
    from typing_extensions import Self

# What two configs may differ in though they compute the same: how weights began and are trained, and a base's rounding
OF_TRAINING = {"base_fingerprint", "codebook_weight", "init_lora_weights", "lora_dropout"}


class HubModel(PeftModel):
    """Loading and saving, from a folder and from the Hub alike: all of an adapter, or an error that says why not."""

    def __init__(self, *args, **kwargs):
        with warnings.catch_warnings():
            # PEFT 0.21 asks a model for an attribute that transformers 5.23 has renamed; no one here can ask for the new name
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
        **kwargs,
    ) -> Self:
        """Loads an adapter, and its base where none is given.

        Three ways: `("org/janus-uc4x")` loads the base that the adapter names, at the commit that it was trained on;
        `("org/janus-uc4x", base_model=...)` takes another path or id of it, or a loaded model; `(model, "org/janus-uc4x")` is
        PEFT's own. An adapter from the Hub is one verified snapshot; then only the disk is read. Once cached, it loads offline.

        Args:
            model: The adapter's folder or Hub id; or, with `model_id`, a loaded base.
            model_id: The adapter's folder or Hub id, where `model` is a base.
            adapter_name: Name of the adapter in this model. Default "default".
            is_trainable: Whether the adapter's weights shall train. Default False.
            config: Overrides the adapter's stored config.
            base_model: The base as a loaded model, a folder or a Hub id. Default: as the adapter's config says.
            subfolder: Where in the folder or repo the adapter lies. Default: at its top.
            revision: Branch, tag or commit of the adapter's repo. Default: main.
            token: For both repos. Default: the one logged in with.
            cache_dir: For both repos. Default: the Hub's own cache.
            local_files_only: Sends no request, for neither repo. Default False.
            force_download: Downloads the adapter again. Default False.
            dtype: Of the base, where it is loaded here. Default: as the base's config says.
            device_map: Of the base, where it is loaded here.
            **kwargs: Passed to `PeftModel.from_pretrained`: `low_cpu_mem_usage`, `autocast_adapter_dtype`, ...

        Raises:
            HubError: The adapter cannot be read from the Hub; the message says which of repo, revision, folder, token and
                connection is to blame.
            AdapterFileError: A file is missing or damaged, or does not hold what the config promises.
            ConfigError: The config holds a bad value, or comes from a newer format.
            BaseModelError: The base cannot be loaded, or is not the one that the adapter was made for.
        """
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
        if isinstance(base, nn.Module):
            refuse_carrier(base)
        else:
            with locked(folder):
                stored = _read_adapter(folder)
            # Not under the lock: many processes load their bases at once
            base = load_base(str(adapter), base, stored, dtype=dtype, device_map=device_map, **access)
        with locked(folder):
            stored = _read_adapter(folder)
            if config is None:
                config = stored
            elif config.base_geometry is None:
                config.base_geometry, config.base_fingerprint = stored.base_geometry, stored.base_fingerprint
            with _explained(folder), keeping_dispatch(base):
                try:
                    return super().from_pretrained(base, str(folder), adapter_name, is_trainable, config, **kwargs)
                except Exception:
                    detach(base)  # the caller's base is as it was
                    raise

    def load_adapter(
        self,
        model_id: str | PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **kwargs,
    ):
        """PEFT's `load_adapter`, from one verified snapshot; an adapter that fails to load leaves nothing behind.

        Under a name that is there, weights take the place of its own: the configs have to agree.

        Args and errors as in `from_pretrained`; `kwargs` are passed to PEFT.
        """
        access = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        folder = pull(model_id, subfolder=subfolder, revision=revision, force_download=force_download, **access)
        with locked(folder):
            stored = _read_adapter(folder)
            if adapter_name in self.peft_config:
                ours = self.peft_config[adapter_name]
                _check_same(ours, stored, adapter_name, folder)
                if stored.base_fingerprint != ours.base_fingerprint:  # weights of one that was trained elsewhere
                    identify(stored, family_of(self.get_base_model()))
            with _explained(folder), self._whole_or_not_there(adapter_name):
                return super().load_adapter(str(folder), adapter_name, is_trainable, **kwargs)

    def add_adapter(self, adapter_name: str, peft_config: UniCompressConfig, *args, **kwargs) -> None:
        """PEFT's; an adapter that cannot be added leaves nothing behind."""
        with self._whole_or_not_there(adapter_name):
            super().add_adapter(adapter_name, peft_config, *args, **kwargs)

    @contextmanager
    def _whole_or_not_there(self, adapter_name: str) -> Iterator[None]:
        """Where a new adapter fails on its way in, nothing of it stays."""
        known, trainable = adapter_name in self.peft_config, [weight for weight in self.parameters() if weight.requires_grad]
        try:
            yield
        except Exception:
            if not known:
                self._forget(adapter_name, trainable)
            raise

    def _forget(self, adapter_name: str, trainable: list[nn.Parameter]) -> None:
        """Takes off what there is of an adapter that failed to load: PEFT's own `delete_adapter` wants it whole."""
        self.peft_config.pop(adapter_name, None)
        base = self.get_base_model()
        for name, module in list(base.named_modules()):
            if isinstance(module, BaseTunerLayer):
                module.delete_adapter(adapter_name)
                if not module._all_available_adapter_names():  # it was put there for this one
                    uncover(base, name, module)
        for weight in trainable:
            weight.requires_grad_(True)  # of the other adapters: PEFT freezes them on its way

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
        """Saves adapters as folders that are whole repos: config, weights, processor and card. All of it, or nothing.

        What was written is loaded before it takes its place: a folder that `from_pretrained` would refuse is never left.

        An adapter named "default" is saved in the folder itself, others in subfolders of their names, as PEFT does. A card
        that is there keeps what a person wrote into it.

        Args:
            save_directory: A folder, made where there is none.
            safe_serialization: Only True: no pickles are written.
            selected_adapters: Names. Default: all.
            is_main_process: False writes nothing, for training on many processes.
            processor: The base's or the adapter's; it is saved with the adapter's placeholder count. Default: the base's own,
                where it lies on this machine; else none is saved.
            base_model: The Hub id of the base, where it was loaded from a folder. Default: as it was loaded.
            card: What the card shall say beyond what the adapter knows of itself.
            **kwargs: Passed to `PeftModel.save_pretrained`: `state_dict`, ...

        Raises:
            AdapterFileError: The folder cannot be written, or what was written does not load as this adapter; what was in the
                folder is as it was.
            AdapterNameError: No adapter is left to save.
            UnsupportedError: `safe_serialization=False`, `save_embedding_layers=True`, or
                `path_initial_model_for_weight_conversion`.
        """
        if not safe_serialization:
            raise UnsupportedError("safe_serialization=False would write a pickle; expected True: only safetensors are loaded.")
        if kwargs.pop("save_embedding_layers", False) is True:
            raise UnsupportedError("save_embedding_layers=True would save weights of the base; expected False.")
        if kwargs.pop("path_initial_model_for_weight_conversion", None) is not None:
            raise UnsupportedError(
                "path_initial_model_for_weight_conversion would turn LoRA into its difference from an initial one; expected "
                "None: a UniCompress adapter leaves the base's weights as they are, so there is nothing to convert."
            )
        if not is_main_process:
            return
        if kwargs.get("state_dict") is not None:  # of torch.compile(model): the same weights under longer names
            kwargs["state_dict"] = {key.removeprefix("_orig_mod."): value for key, value in kwargs["state_dict"].items()}
        _ = self.active_peft_config  # raises where no adapter is left
        for name in selected_adapters or list(self.peft_config):
            folder = Path(save_directory, "" if name == "default" else name)
            with saving(folder) as stage:
                super().save_pretrained(str(stage), selected_adapters=[name], save_embedding_layers=False, **kwargs)
                if name != "default":  # PEFT has put it into a folder of its name
                    for path in (stage / name).iterdir():
                        path.rename(stage / path.name)
                    (stage / name).rmdir()
                if saved := self._processor_of(name, processor):
                    saved.save_pretrained(stage)
                    for file, text in pipeline_files(family_of(self.get_base_model()).model_type).items():
                        (stage / file).write_text(text, "utf-8")
                seal_folder(stage, base_model)
                self._check_saved(stage, name)
                if (folder / CARD_NAME).is_file():
                    shutil.copy(folder / CARD_NAME, stage)
                update_card(stage, card or CardFacts(), published_as(stage) or local_name(folder))

    def _check_saved(self, stage: Path, name: str) -> None:
        """Raises AdapterFileError unless what was written is this adapter where it is loaded: onto a base without weights."""
        base = self.get_base_model()
        with torch.device("meta"):
            plain = getattr(transformers, family_of(base).model_class)(copy.deepcopy(base.config))
        try:
            config = UniCompressConfig.from_pretrained(stage)
            loaded = type(self)(plain, config, name, low_cpu_mem_usage=True)
            UniCompressTuner._remap_adapter_state_dict_for_load(loaded, config, name, load_file(find_weights(stage)))
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
                f"more modules; expected {theirs[path]:.6g}, as its config says, which is what would be loaded again. Set the "
                "scale back (set_scale, unscale_layer), or change lora_alpha and attach anew. Nothing was changed."
            )

    def create_or_update_model_card(self, output_dir: str) -> None:
        """PEFT's card would name another library and lose the base; `save_pretrained` writes ours with the rest."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload UniCompress adapter",
        token: str | bool | None = None,
        processor: ProcessorMixin | None = None,
        base_model: str | None = None,
        card: CardFacts | None = None,
    ) -> str:
        """Pushes the active adapter as a repo of its own, in one commit. For a folder, see `push_folder`.

        Args:
            repo_id: "org/name"; made where there is none.
            private: Whether a new repo is private. Default: as the organisation has it.
            revision: The branch to push to; made where there is none. Default: main.
            create_pr: Opens a pull request instead. Default False.
            commit_message: Of the one commit.
            token: Default: the one logged in with.
            processor: As in `save_pretrained`.
            base_model: As in `save_pretrained`: needed where the base was loaded from a folder.
            card: As in `save_pretrained`.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            AdapterFileError, BaseModelError, HubError: As `uc_adapters.hub.push.push_folder`.
        """
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(
                directory, selected_adapters=[self.active_adapter], processor=processor, base_model=base_model, card=card
            )
            folder = Path(directory, "" if self.active_adapter == "default" else self.active_adapter)
            return push_folder(
                folder,
                repo_id,
                private=private,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
                token=token,
                card=card,
            )

    def _processor_of(self, adapter_name: str, processor: ProcessorMixin | None) -> ProcessorMixin | None:
        """A copy of the processor with the adapter's placeholder count."""
        name, commit = name_and_commit(self.get_base_model())
        if processor is None and name is not None:
            with suppress(OSError, ValueError):  # the base has none here: nothing is fetched for it
                processor = AutoProcessor.from_pretrained(name, revision=commit, local_files_only=True)
        if processor is None:
            return None
        config = self.peft_config[adapter_name]
        return family_of(self.get_base_model()).compact_processor(processor, config.stride, config.num_global_tokens)


def _scalings(base: nn.Module, name: str) -> dict[str, float]:
    """What LoRA's product is multiplied by in each module."""
    return {
        path.replace("_orig_mod.", ""): float(module.scaling[name])
        for path, module in base.named_modules()
        if isinstance(module, LoraLayer) and name in module.scaling
    }


def refuse_carrier(base: nn.Module) -> None:
    """Raises BaseModelError where a base has an adapter already, or is no model."""
    if not isinstance(base, nn.Module):
        raise BaseModelError(
            f"base={base!r} is a {type(base).__name__}; expected a loaded model: "
            "AutoModelForImageTextToText.from_pretrained(...)."
        )
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise BaseModelError(
            "The base carries an adapter already; expected a plain base. Add a second adapter with model.add_adapter(name, "
            "config) or model.load_adapter(folder, name), or take the first off with model.unload()."
        )


@contextmanager
def keeping_dispatch(base: nn.Module) -> Iterator[None]:
    """Hides a base's device map from PEFT, which would take it apart and guess another, for disks by writing the base anew."""
    device_map = base.__dict__.pop("hf_device_map", None)
    try:
        yield
    finally:
        if device_map is not None:
            base.hf_device_map = device_map


def _read_adapter(folder: Path) -> UniCompressConfig:
    read_config(folder)  # what is wrong with the config is told before what is wrong with the weights
    find_weights(folder)
    return UniCompressConfig.from_pretrained(folder)


def _check_same(ours: UniCompressConfig, stored: UniCompressConfig, adapter_name: str, folder: Path) -> None:
    """PEFT looks at the weights alone where the name is known, and would go on with the config that is there."""
    ours, stored = (
        {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
        for config in (ours, stored)
    )
    free = UNSEALED | OF_TRAINING
    differing = [name for name in sorted(stored) if name not in free and stored[name] != ours.get(name)]
    if differing:
        told = ", ".join(f"{name} {ours.get(name)} here, {stored[name]} there" for name in differing)
        raise AdapterFileError(
            f"The adapter in {folder} is not of the form of {adapter_name!r}: {told}. Load it under another name, or take "
            f"that one off with delete_adapter({adapter_name!r})."
        )


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """PEFT trusts a config's values: what it stumbles over is told as the file's fault."""
    try:
        yield
    except (TypeError, ValueError, KeyError, AttributeError, re.error) as error:
        if type(error).__module__ == AdapterFileError.__module__:  # one of ours says it better
            raise
        raise AdapterFileError(
            f"The adapter in {folder} could not be attached: {type(error).__name__}: {error}. Its config holds a value that "
            "PEFT cannot take (fetch or save it again), or parts of the base are not in memory, where PEFT could reach them."
        ) from error
