"""UniCompressModel: a PeftModel that trains on, and draws, compact sequences."""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.utils import ModelOutput

from .config import UniCompressConfig
from .drawing import Drawing, Scores
from .errors import BaseModelError, InputError, UnsupportedError
from .families import Janus, family_of
from .generation import draw, left_pad
from .hub import read_adapter
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
        dtype: torch.dtype | str | None = None,
        device_map: str | dict | None = None,
        **kwargs,
    ) -> UniCompressModel:
        """Loads an adapter, and its base where none is given.

        Three ways: `("org/janus-uc4x")` loads the base that the adapter names; `("org/janus-uc4x", base_model=...)`
        takes another path or id of it, or a loaded model; `(model, "org/janus-uc4x")` is PEFT's own.

        Args:
            model: The adapter's folder or Hub id; or, with `model_id`, a loaded base.
            model_id: The adapter's folder or Hub id, where `model` is a base.
            adapter_name: Name of the adapter in this model. Default "default".
            is_trainable: Whether the adapter's weights shall train. Default False.
            config: Overrides the adapter's stored config.
            base_model: The base as a loaded model, a folder or a Hub id. Default: as the adapter's config says.
            dtype: Of the base, where it is loaded here. Default: as the base's config says.
            device_map: Of the base, where it is loaded here.
            **kwargs: Passed to `PeftModel.from_pretrained`: `revision`, `token`, `low_cpu_mem_usage`, ...

        Raises:
            AdapterFileError: A file is missing or damaged, or does not hold what the config promises.
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
        adapter = str(adapter)
        stored = read_adapter(adapter, **kwargs)
        if isinstance(base, nn.Module):
            _refuse_carrier(base)
        else:
            source = str(base) if base is not None else stored.base_model_name_or_path
            base = _load_base(adapter, source, stored.revision if base is None else None, dtype, device_map)
        try:
            return super().from_pretrained(base, adapter, adapter_name, is_trainable, config or stored, **kwargs)
        except Exception:
            detach(base)  # the caller's base is as it was
            raise

    def load_adapter(self, model_id: str | PathLike, adapter_name: str, *args, **kwargs):
        """PEFT's `load_adapter`, with the file checked first; an adapter that fails to load leaves nothing behind."""
        known = adapter_name in self.peft_config
        read_adapter(str(model_id), **kwargs)
        try:
            return super().load_adapter(str(model_id), adapter_name, *args, **kwargs)
        except Exception:
            if not known and adapter_name in self.peft_config:
                with suppress(Exception):  # the first error is the one to tell
                    self.delete_adapter(adapter_name)
            raise

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
    config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
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


def _load_base(adapter: str, source: str | None, revision: str | None, dtype, device_map) -> nn.Module:
    if source is None:
        raise BaseModelError(f"Adapter {adapter!r} names no base; expected one: pass base_model=, a path, an id or a model.")
    options = {name: value for name, value in {"dtype": dtype, "device_map": device_map}.items() if value is not None}
    try:
        return AutoModelForImageTextToText.from_pretrained(source, revision=revision, **options)
    except OSError as error:
        raise BaseModelError(
            f"Adapter {adapter!r} needs base {source!r}, which could not be loaded: {error} "
            "Pass base_model= with its folder, its id or the loaded model."
        ) from error
