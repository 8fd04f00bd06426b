"""UniCompressModel: a PeftModel that trains on, and draws, compact sequences."""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoProcessor, ProcessorMixin
from transformers.utils import ModelOutput

from .config import UniCompressConfig
from .drawing import Drawing, Scores
from .errors import AdapterFileError, BaseModelError, InputError, UnsupportedError
from .families import Janus, family_of
from .generation import draw, left_pad
from .hub.base import load_base
from .hub.card import CardFacts, render_card
from .hub.folder import CARD_NAME, check_weights, locked, read_config, saving, seal_folder
from .hub.pull import pull
from .hub.push import push_folder
from .identity import name_and_commit
from .tuner import DrawLayer, UniCompressLayer, detach


@dataclass
class JointOutput(ModelOutput):
    """Per-token scores of text and drawn codes alike, under the names that TRL's trainers read.

    Attributes:
        loss: Mean negative log-probability over the labelled positions (sum, where divided by `num_items_in_batch`).
        log_probs: (B, L - 1), of the label at the next position; zero where there is none.
        entropy: (B, L - 1), in nats.
        is_top1: (B, L - 1), 1 where the label is the most probable token; a cell counts the share of its codes.
        label_mask: (B, L - 1), True where there is a label.
    """

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None


class UniCompressModel(PeftModel):
    """A base model with UniCompress adapters, one of them active.

    Everything of `PeftModel` works; `generate` also draws compactly, and `forward` also takes images to draw. With
    the adapter disabled the model is its base, bit for bit, and needs inputs with the base's placeholder count.
    """

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
    ) -> UniCompressModel:
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
        with locked(folder):
            stored = _read_adapter(folder)
            if isinstance(base, nn.Module):
                _refuse_carrier(base)
            else:
                base = load_base(str(adapter), base, stored, dtype=dtype, device_map=device_map, **access)
            with _explained(folder):
                try:
                    return super().from_pretrained(base, str(folder), adapter_name, is_trainable, config or stored, **kwargs)
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

        Args and errors as in `from_pretrained`; `kwargs` are passed to PEFT.
        """
        known = adapter_name in self.peft_config
        access = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        folder = pull(model_id, subfolder=subfolder, revision=revision, force_download=force_download, **access)
        with locked(folder):
            _read_adapter(folder)
            with _explained(folder):
                try:
                    return super().load_adapter(str(folder), adapter_name, is_trainable, **kwargs)
                except Exception:
                    if not known and adapter_name in self.peft_config:
                        with suppress(Exception):  # the first error is the one to tell
                            self.delete_adapter(adapter_name)
                    raise

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
            AdapterFileError: The folder cannot be written; what was in it is as it was.
            UnsupportedError: `safe_serialization=False`.
        """
        if not safe_serialization:
            raise UnsupportedError("safe_serialization=False would write a pickle; expected True: only safetensors are loaded.")
        if not is_main_process:
            return
        folder = Path(save_directory)
        with saving(folder) as stage:
            super().save_pretrained(str(stage), selected_adapters=selected_adapters, **kwargs)
            for name in selected_adapters or self.peft_config:
                part = Path() if name == "default" else Path(name)
                if saved := self._processor_of(name, processor):
                    saved.save_pretrained(stage / part)
                seal_folder(stage / part, base_model)
                present = folder / part / CARD_NAME
                existing = [present.read_text()] if present.is_file() else []
                rendered = render_card(read_config(stage / part), str(folder / part), card or CardFacts(), existing)
                (stage / part / CARD_NAME).write_text(rendered)

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
        processor = copy.deepcopy(processor)
        config = self.peft_config[adapter_name]
        processor.num_image_tokens = config.num_global_tokens + 1 + self.family.geometry.read_side**2 // config.stride**2
        return processor

    @property
    def family(self) -> Janus:
        """The base's family."""
        return family_of(self.get_base_model())

    @property
    def drawing(self) -> Drawing | None:
        """The active adapter's drawing side; None while disabled.

        Raises:
            UnsupportedError: Two adapters are active.
        """
        host = next(module for module in self.modules() if isinstance(module, DrawLayer))
        module = host.active_module()
        return None if module is None else Drawing(self.family, module)

    @property
    def num_image_tokens(self) -> int:
        """Placeholders of one image to read: N_g + 1 + T / s^2, or the base's T while disabled."""
        dense = self.family.geometry.read_side**2
        drawing = self.drawing
        if drawing is None:
            return dense
        return drawing.module.num_global_tokens + 1 + dense // drawing.module.stride**2

    def train_only(self, part: str) -> None:
        """Chooses what of the active adapter trains, as the paper's two stages do (section 3).

        Args:
            part: "tokenizer" (stage 1: extractors, and a decompressor that works after the loop) or
                "language model" (stage 2: LoRA, separators, and the "cell" decompressor, which learns from the language
                model's hidden states).
        """
        if part not in ("tokenizer", "language model"):
            raise InputError(f"part={part!r}; expected 'tokenizer' or 'language model'.")
        name = self.active_adapter
        self.set_requires_grad(name, part == "language model")
        for host in self.modules():
            if not isinstance(host, UniCompressLayer):
                continue
            module = host.lora_uc[name]
            in_loop = getattr(module, "in_loop", False)
            for path, parameter in module.named_parameters():
                of_tokenizer = path.startswith("extractor") or (path.startswith("decompressor") and not in_loop)
                parameter.requires_grad_(of_tokenizer == (part == "tokenizer"))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        *,
        labels: torch.Tensor | None = None,
        drawn_pixel_values: torch.Tensor | None = None,
        drawn_mask: torch.Tensor | None = None,
        fused_lm_head: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ):
        """The base's forward; with images to draw, or from a TRL trainer, the joint loss over text and drawn codes.

        Args:
            input_ids: (B, L), with `num_image_tokens` placeholders an image, to read or to draw.
            pixel_values: Images to read, (N, 3, S, S), in the order of their placeholders.
            attention_mask: (B, L).
            position_ids: (B, L).
            labels: (B, L), -100 where nothing is to learn. At a drawn image, any other value marks its places.
            drawn_pixel_values: Images to draw, (M, 3, S, S), in the order of their placeholders.
            drawn_mask: (B, L), True at the places of drawn images.
            fused_lm_head: TRL's request for per-token scores instead of logits.
            num_items_in_batch: What the summed loss is divided by; default the number of labelled positions.
            **kwargs: Passed to the base.

        Returns:
            The base's output, or a `JointOutput`.

        Raises:
            InputError: Placeholders and images disagree, pixels are of the wrong shape, or images are to be drawn by a
                disabled adapter.
        """
        _refuse_mixed_batch(kwargs)
        self._check_inputs(input_ids, pixel_values, drawn_pixel_values, drawn_mask)
        drawing = self.drawing
        if drawn_pixel_values is None and (not fused_lm_head or drawing is None):
            if fused_lm_head:
                kwargs["fused_lm_head"] = True
            if num_items_in_batch is not None:
                kwargs["num_items_in_batch"] = num_items_in_batch
            return super().forward(
                input_ids=input_ids,
                pixel_values=pixel_values,
                attention_mask=attention_mask,
                position_ids=position_ids,
                labels=labels,
                **kwargs,
            )
        if drawing is None:
            raise InputError("drawn_pixel_values with the adapter disabled; expected an enabled one: only it draws compactly.")
        if labels is None:
            raise InputError(
                "labels=None with images to draw; expected labels: this forward scores them. See UniCompressCollator."
            )
        return self._joint_forward(
            drawing,
            input_ids,
            pixel_values,
            attention_mask,
            position_ids,
            labels,
            drawn_pixel_values,
            drawn_mask,
            num_items_in_batch,
        )

    def _joint_forward(
        self,
        drawing: Drawing,
        input_ids,
        pixel_values,
        attention_mask,
        position_ids,
        labels,
        drawn_pixel_values,
        drawn_mask,
        num_items_in_batch,
    ) -> JointOutput:
        family = drawing.family
        if drawn_mask is None:
            drawn_mask = torch.zeros_like(input_ids, dtype=torch.bool)
        read_mask = (input_ids == family.image_token_id) & ~drawn_mask
        embeddings = family.embed_prompt(input_ids, pixel_values, read_mask)  # (B, L, D)
        codes = None
        if drawn_pixel_values is not None:
            codes = drawing.compress(drawn_pixel_values)
            places = drawing.embed(codes).to(embeddings.dtype)  # (M, N_g + 1 + T', D)
            embeddings = embeddings.masked_scatter(drawn_mask.unsqueeze(-1), places)
        hidden = family.language_model(
            inputs_embeds=embeddings, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state[:, :-1]  # (B, L - 1, D): position t predicts t + 1
        targets, drawn = labels[:, 1:], drawn_mask[:, 1:]
        label_mask = targets != -100
        text = label_mask & ~drawn
        scores = _score_text(family.text_logits(hidden[text]), targets[text])
        fields = [torch.zeros(targets.shape, device=hidden.device).masked_scatter(text, score) for score in scores]
        if codes is not None:
            before = hidden[drawn].unflatten(0, (len(codes.dense), -1))  # (M, N_g + 1 + T', D)
            drawn_scores: Scores = drawing.score(before, codes)
            parts = (drawn_scores.log_probs, drawn_scores.entropy, drawn_scores.accuracy)
            fields = [field.masked_scatter(drawn, part) * label_mask for field, part in zip(fields, parts, strict=True)]
        log_probs, entropy, is_top1 = fields
        count = label_mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return JointOutput(
            loss=-log_probs.sum() / count,
            log_probs=log_probs,
            entropy=entropy.detach(),
            is_top1=is_top1.detach(),
            label_mask=label_mask,
        )

    def generate(self, *args, **kwargs) -> torch.Tensor:
        """The base's `generate`; `generation_mode="image"` draws compactly and returns dense tokens (B, T).

        Text: everything that the base takes. Images: see `uc_adapters.generation.draw`. With the adapter disabled, both
        are the base's, token for token.

        Raises:
            InputError: An empty batch or prompt, or placeholders that do not fit the images.
            UnsupportedError: Beam search for drawing, or two active adapters.
        """
        _refuse_mixed_batch(kwargs)
        drawing = self.drawing
        if drawing is None:
            self._check_inputs(args[0] if args else kwargs.get("input_ids"), kwargs.get("pixel_values"), None, None)
            return super().generate(*args, **kwargs)
        if kwargs.get("inputs_embeds") is not None and kwargs.get("generation_mode") != "image":
            return super().generate(*args, **kwargs)
        input_ids = args[0] if args else kwargs.pop("input_ids", kwargs.pop("inputs", None))
        if input_ids is None or input_ids.ndim != 2 or 0 in input_ids.shape:
            shape = None if input_ids is None else tuple(input_ids.shape)
            raise InputError(f"input_ids of shape {shape}; expected (batch, tokens), neither of them empty.")
        self._check_inputs(input_ids, kwargs.get("pixel_values"), None, None)
        if kwargs.get("generation_mode") == "image":
            kwargs.pop("generation_mode")
            return draw(drawing, input_ids, **kwargs)
        kwargs.pop("generator", None)
        if kwargs.get("attention_mask") is not None:
            input_ids, kwargs["attention_mask"] = left_pad(input_ids, kwargs["attention_mask"])
        return super().generate(input_ids, **kwargs)

    def _check_inputs(self, input_ids, pixel_values, drawn_pixel_values, drawn_mask) -> None:
        family = self.family
        for pixels in (pixel_values, drawn_pixel_values):
            if pixels is not None:
                family.check_pixels(pixels)
        if input_ids is None or (pixel_values is None and drawn_pixel_values is None):
            return
        expected = self.num_image_tokens
        images = sum(len(pixels) for pixels in (pixel_values, drawn_pixel_values) if pixels is not None)
        placeholders = int((input_ids == family.image_token_id).sum())
        if placeholders != images * expected:
            state = "disabled" if self.drawing is None else "enabled"
            raise InputError(
                f"{placeholders} image placeholders for {images} image(s); with the adapter {state}, expected {expected} an "
                f"image. Use the processor saved with the {'base' if state == 'disabled' else 'adapter'}: "
                f"AutoProcessor.from_pretrained(...), or set processor.num_image_tokens = {expected}."
            )
        drawn = 0 if drawn_mask is None else int(drawn_mask.sum())
        if drawn != (0 if drawn_pixel_values is None else len(drawn_pixel_values) * expected):
            raise InputError(
                f"drawn_mask marks {drawn} places; expected {expected} for each image of drawn_pixel_values. "
                "Build batches with UniCompressCollator."
            )


def get_uc_model(
    base: nn.Module, config: UniCompressConfig, adapter_name: str = "default", *, low_cpu_mem_usage: bool = False
) -> UniCompressModel:
    """Attaches a new, untrained adapter to a base model, in place, as `peft.get_peft_model` does.

    An untrained adapter is no no-op: the base reads and draws through fresh compression modules until they are trained
    (`recipes/fit_tokenizer.py`, then `recipes/finetune.py`). Disabled, it is the base.

    Args:
        base: A loaded base model of a supported family.
        config: The adapter's config; it is copied.
        adapter_name: Default "default".
        low_cpu_mem_usage: Leaves the new weights on the meta device, for loading into. Default False.

    Raises:
        BaseModelError: The base cannot carry the adapter, or carries one already.
        ConfigError: `target_modules` matches nothing in the language model.
        AdapterNameError: PEFT cannot hold the name.
    """
    _refuse_carrier(base)
    config = copy.deepcopy(config)
    return UniCompressModel(base, config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)


def _refuse_carrier(base: nn.Module) -> None:
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise BaseModelError(
            "The base carries an adapter already; expected a plain base. Add a second adapter with model.add_adapter(name, "
            "config) or model.load_adapter(folder, name), or take the first off with model.unload()."
        )


def _refuse_mixed_batch(kwargs: dict) -> None:
    if kwargs.get("adapter_names") is not None:
        raise UnsupportedError(
            f"adapter_names={kwargs['adapter_names']!r} asks for several adapters in one batch; expected one, since images "
            "have one compact form a batch. Choose with model.set_adapter(name) and run a batch for each."
        )


def _score_text(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probability, entropy and top-1 hit of targets (N,) under logits (N, vocabulary), each (N,)."""
    log_probs = logits.float().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    hits = (log_probs.argmax(-1) == targets).float()
    return log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy, hits


def _read_adapter(folder: Path) -> UniCompressConfig:
    config = UniCompressConfig.from_pretrained(folder)
    check_weights(folder, read_config(folder))
    return config


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """PEFT trusts a config's values: what it stumbles over is told as the file's fault."""
    try:
        yield
    except (TypeError, KeyError, AttributeError, re.error) as error:
        raise AdapterFileError(
            f"The adapter in {folder} could not be attached: {type(error).__name__}: {error}. Its config holds a value that "
            "PEFT cannot take: fetch or save it again."
        ) from error
