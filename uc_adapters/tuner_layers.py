"""Hosts: the base's own modules with an adapter's compression modules beside them, one host for reading, one for drawing.

Where features are read, the reading host stands in their path: what goes into the base's aligner is compressed there. Where
codes are read, images enter as word embeddings and no module takes them in: the host only carries, and a hook compresses
ahead of the model. The drawing host only carries; the drawing loop and the joint loss ask it for its module.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .compression import CodeReadCompressor, DrawCompressor, ReadCompressor
from .errors import UnsupportedError
from .families import Family
from .layers import Grid

CONTAINER = "lora_uc"  # transformers' load_adapter inserts adapter names behind one prefix a method: "lora_"


class UniCompressLayer(nn.Module, BaseTunerLayer):
    """A host: the base's own module, and the compression modules of each adapter beside it."""

    adapter_layer_names = (CONTAINER,)
    module_class: type[nn.Module]

    def __init__(self, base_layer: nn.Module, family: Family):
        super().__init__()
        self.base_layer, self.family = base_layer, family
        self.lora_uc = nn.ModuleDict()

    def add_adapter(self, adapter_name: str, module: nn.Module) -> None:
        """Adds an adapter's module on the base layer's device and in its dtype."""
        self.lora_uc[adapter_name] = module
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def active_module(self) -> nn.Module | None:
        """The active adapter's module; None while disabled, or where no adapter is left.

        Raises:
            UnsupportedError: Two adapters are active.
        """
        names = [name for name in self.active_adapters if name in self.lora_uc]
        if self.disable_adapters or not names:
            return None
        if len(names) > 1:
            raise UnsupportedError(
                f"Adapters {', '.join(map(repr, names))} are active at once; an image has one compact form, so expected "
                f"one. Choose with model.set_adapter({names[0]!r})."
            )
        return self.lora_uc[names[0]]

    def unload_and_optionally_merge_module(self, *args, **kwargs) -> nn.Module:
        """PEFT's way to take a layer off: the base's own module, as it was."""
        return self.base_layer

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """The base's own module."""
        return self.base_layer(x, *args, **kwargs)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module):
        # Base layers are containers: PEFT would look for their `.weight`
        layer = next(module for module in base_layer.modules() if list(module.parameters(recurse=False)))
        with align_module_device(layer):  # of an offloaded one, the device where it computes
            parameter = next(layer.parameters(recurse=False))
            return parameter.device, parameter.dtype


class ReadLayer(UniCompressLayer):
    """What both ways to read share."""

    def __init__(self, base_layer: nn.Module, family: Family):
        super().__init__(base_layer, family)
        self.guard = family.base.register_forward_pre_hook(self._refuse_drawn, with_kwargs=True)

    def unload_and_optionally_merge_module(self, *args, **kwargs) -> nn.Module:
        self.guard.remove()
        return super().unload_and_optionally_merge_module(*args, **kwargs)

    def _refuse_drawn(self, base: nn.Module, args: tuple, kwargs: dict) -> None:
        """The base takes any argument and looks at few: images to draw would be read, and their places learned as words."""
        told = [name for name in kwargs if name.startswith("gen_") or name == "teacher_probs"]
        if told:
            raise UnsupportedError(
                f"{', '.join(told)} came to the base, which knows nothing of them; expected a UniCompressModel around it: "
                "get_uc_model(base, config), or UniCompressModel.from_pretrained(...). A plain PeftModel reads alone."
            )

    @abstractmethod
    def image_embeddings(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None) -> list[torch.Tensor]:
        """Images (N, 3, H, W) -> what the language model reads of each, N times (N_g + 1 + T', D)."""

    def embed_prompt(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        image_sizes: torch.Tensor | None,
        read_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Word embeddings (B, L, D) with the images to read at the placeholders of `read_mask` (B, L)."""
        embeddings = self.family.base.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return embeddings
        images = torch.cat(self.image_embeddings(pixel_values, image_sizes))  # (N * P, D)
        return embeddings.masked_scatter(read_mask.unsqueeze(-1), images.to(embeddings.dtype))

    def encode_for_generate(self, kwargs: dict) -> dict:
        """Arguments of the base's `generate`, with the images to read as it can take them."""
        return kwargs


class FeatureReadLayer(ReadLayer):
    """Host of an aligner: compresses the features that go in."""

    module_class = ReadCompressor

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        module = self.active_module()
        if module is not None:
            side = self.family.geometry.read_side
            x = module(x.to(module.separator.dtype), (side, side)).to(x.dtype)  # (B, T, C) -> (B, N_g + 1 + T', C)
        return self.base_layer(x, *args, **kwargs)

    def image_embeddings(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None) -> list[torch.Tensor]:
        return list(self.family.base.model.get_image_features(pixel_values, return_dict=True).pooler_output)


class DrawLayer(UniCompressLayer):
    """Host of a head of the codes: carries the drawing side. The drawing loop calls the base layer itself."""

    module_class = DrawCompressor

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.active_module() is not None:
            raise UnsupportedError(
                "The base's own drawing loop would draw dense tokens with a model tuned for compact ones. Draw with a "
                "UniCompressModel: UniCompressModel.from_pretrained(base, adapter).generate(..., "
                "generation_mode='image')."
            )
        return self.base_layer(x, *args, **kwargs)


@dataclass
class CompactFeatures(BaseModelOutputWithPooling):
    """What the base takes for its own encoded images; a class of its own, so that nothing is compressed twice."""


class CodeReadLayer(ReadLayer):
    """Host of a VQ tokenizer's encoder: carries the reading side, and hooks the model to compress what goes in."""

    module_class = CodeReadCompressor

    def __init__(self, base_layer: nn.Module, family: Family):
        super().__init__(base_layer, family)
        self.hook = family.base.model.register_forward_pre_hook(self._compress_inputs, with_kwargs=True)

    def train(self, mode: bool = True) -> CodeReadLayer:
        return _train_beside(self, mode)

    def unload_and_optionally_merge_module(self, *args, **kwargs) -> nn.Module:
        self.hook.remove()
        return super().unload_and_optionally_merge_module(*args, **kwargs)

    def image_embeddings(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None) -> list[torch.Tensor]:
        embeddings: dict[int, torch.Tensor] = {}
        for rows, pixels, size in self.family.by_size(pixel_values, image_sizes):
            codes = self.family.dense_codes(pixels)
            embeddings.update(zip(rows, self._compress(codes, self.family.read_grid(size)), strict=True))
        return [embeddings[row] for row in range(len(pixel_values))]

    @torch.no_grad()
    def encode_for_generate(self, kwargs: dict) -> dict:
        """Encodes ahead: transformers would encode densely, and match placeholders to images by that."""
        return self._encode(kwargs) if kwargs.get("pixel_values") is not None else kwargs

    def _encode(self, kwargs: dict) -> dict:
        """Arguments of the base with compact images in the place of pixels."""
        images = self._pack(self.image_embeddings(kwargs["pixel_values"], kwargs.get("image_sizes")))
        left = {name: value for name, value in kwargs.items() if name not in ("pixel_values", "image_sizes")}
        return left | {"mm_encoder_outputs": {"image": images}}

    def _compress(self, codes: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Codes (B, T) -> (B, N_g + 1 + T', D), in the language model's dtype."""
        module, family = self.active_module(), self.family
        dtype, embeddings = module.separator.dtype, family.embed_codes(codes)
        return module(embeddings.to(dtype), family.codebook[codes].to(dtype), grid).to(embeddings.dtype)

    def _pack(self, embeddings: list[torch.Tensor]) -> CompactFeatures:
        any_size = self.family.geometry.image_size is None
        return CompactFeatures(pooler_output=embeddings if any_size else torch.stack(embeddings))

    def _compress_inputs(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Ahead of the model's forward: pixels, or images that transformers' `generate` encoded densely, become compact."""
        images = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if self.active_module() is None or isinstance(images, CompactFeatures):
            return None
        if images is not None:
            grids = self.family.encoded_codes(images)  # N times (H, W)
            compact = [self._compress(codes.flatten()[None], tuple(codes.shape))[0] for codes in grids]
            self._check_repeats(kwargs.get("input_ids"), compact)
            return args, kwargs | {"mm_encoder_outputs": {"image": self._pack(compact)}}
        return None if kwargs.get("pixel_values") is None else (args, self._encode(kwargs))

    def _check_repeats(self, input_ids: torch.Tensor | None, images: list[torch.Tensor]) -> None:
        """transformers repeats dense images for beams and several sequences, by lengths that are not ours."""
        if input_ids is None:
            return
        places, compact = int((input_ids == self.family.image_token_id).sum()), sum(map(len, images))
        if places > compact and places % compact == 0:
            raise UnsupportedError(ONE_ANSWER.format(f"{places // compact} answers a prompt"))


ONE_ANSWER = (
    "{} through a plain PeftModel or transformers' own generate; expected one answer a prompt, no beams: this base's images "
    "would be repeated wrongly. Load the adapter with UniCompressModel.from_pretrained(base, adapter), which does both."
)


class CodeDrawLayer(UniCompressLayer):
    """Host in a VQ tokenizer: carries the drawing side, where the head of the words draws codes."""

    module_class = DrawCompressor

    def train(self, mode: bool = True) -> CodeDrawLayer:
        return _train_beside(self, mode)


def _train_beside(layer: UniCompressLayer, mode: bool) -> UniCompressLayer:
    """`train(mode)` for the adapters alone: a batch norm in the frozen tokenizer would drift with every batch."""
    nn.Module.train(layer, mode)
    layer.base_layer.train(False)
    return layer


def layer_classes(family: Family | type[Family]) -> dict[str, type[UniCompressLayer]]:
    """The host of each of the family's roles."""
    if not family.shared_vocabulary:
        layers = {"read": FeatureReadLayer, "draw": DrawLayer}
    else:
        layers = {"read": CodeReadLayer, "draw": CodeDrawLayer}
    return {role: layer for role, layer in layers.items() if role in family.module_names}
