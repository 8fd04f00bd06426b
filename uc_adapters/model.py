"""UniCompressModel: a PeftModel that trains on, and draws, compact sequences."""

from __future__ import annotations

import copy
from functools import cached_property

import torch
from torch import nn

from .config import UniCompressConfig
from .drawing import Drawing
from .errors import InputError, UnsupportedError
from .families import Janus, family_of
from .generation import draw, left_pad
from .hub.model import SharedModel, refuse_carrier
from .joint_loss import joint_loss
from .tuner import DrawLayer, UniCompressLayer


class UniCompressModel(SharedModel):
    """A base model with UniCompress adapters, one of them active.

    Everything of `PeftModel` works; `generate` also draws compactly, and `forward` also takes images to draw. With
    the adapter disabled the model is its base, bit for bit, and needs inputs with the base's placeholder count.
    """

    @cached_property
    def family(self) -> Janus:
        """The base's family."""
        return family_of(self.get_base_model())

    @property
    def drawing(self) -> Drawing | None:
        """The active adapter's drawing side; None while disabled.

        Raises:
            UnsupportedError: Two adapters are active.
        """
        host: DrawLayer = self.get_base_model().get_submodule(self.family.roles["draw"])
        module = host.active_module()
        return None if module is None else Drawing(self.family, module)

    @property
    def num_image_tokens(self) -> int:
        """Placeholders of one image to read: N_g + 1 + T / s^2, or the base's T while disabled."""
        side = self.family.geometry.read_side
        return side**2 if self.drawing is None else self.active_peft_config.num_image_tokens(side)

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
        return joint_loss(
            drawing,
            input_ids,
            labels,
            pixel_values=pixel_values,
            drawn_pixel_values=drawn_pixel_values,
            drawn_mask=drawn_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            num_items_in_batch=num_items_in_batch,
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
    refuse_carrier(base)
    config = copy.deepcopy(config)
    return UniCompressModel(base, config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)


def _refuse_mixed_batch(kwargs: dict) -> None:
    if kwargs.get("adapter_names") is not None:
        raise UnsupportedError(
            f"adapter_names={kwargs['adapter_names']!r} asks for several adapters in one batch; expected one, since images "
            "have one compact form a batch. Choose with model.set_adapter(name) and run a batch for each."
        )
