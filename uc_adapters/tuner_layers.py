"""Layers around the base's own modules that hold the adapters' compression modules: one layer for reading, one for drawing.

If the base reads features, the reading layer compresses the input of the base's aligner. If the base reads codes, images enter
as token embeddings, and there is no module to wrap: the layer only stores the weights, and a forward pre-hook of the model
compresses its input. The drawing layer only stores weights; the drawing loop and the joint loss take its module.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .compression import CodeReadCompressor, DrawCompressor, NoReadCompressor, ReadCompressor
from .errors import UnsupportedError
from .families import Family
from .images import Images
from .layers import Grid
from .positions import dense_reading, sequence_positions

CONTAINER = "lora_uc"  # begins with "lora_": transformers' load_adapter inserts adapter names after one prefix per method


class UniCompressLayer(nn.Module, BaseTunerLayer):
    """A layer around a module of the base, with the compression module of each adapter."""

    adapter_layer_names = (CONTAINER,)
    module_class: type[nn.Module]

    def __init__(self, base_layer: nn.Module, family: Family):
        super().__init__()
        self.base_layer, self.family = base_layer, family
        self.lora_uc = nn.ModuleDict()

    def add_adapter(self, adapter_name: str, module: nn.Module) -> None:
        """Adds an adapter's module, on the device and in the dtype of the base layer."""
        self.lora_uc[adapter_name] = module
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def active_module(self) -> nn.Module | None:
        """Returns the active adapter's module; None if the adapter is disabled, or no adapter is left.

        Raises:
            UnsupportedError: Two adapters are active.
        """
        names = [name for name in self.active_adapters if name in self.lora_uc]
        if self.disable_adapters or not names:
            return None
        if len(names) > 1:
            raise UnsupportedError(
                f"Adapters {', '.join(map(repr, names))} are active at once; expected one active adapter, since "
                f"an image has one compact form. Choose it with model.set_adapter({names[0]!r})."
            )
        return self.lora_uc[names[0]]

    def unload_and_optionally_merge_module(self, *args, **kwargs) -> nn.Module:
        """Returns the base's own module, unchanged. PEFT calls it to remove the layer."""
        return self.base_layer

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Runs the base's own module."""
        return self.base_layer(x, *args, **kwargs)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module):
        # Base layers are containers without a `.weight`, for which PEFT would look
        layer = next(module for module in base_layer.modules() if list(module.parameters(recurse=False)))
        with align_module_device(layer):  # for an offloaded layer, this is the device where it computes
            parameter = next(layer.parameters(recurse=False))
            return parameter.device, parameter.dtype


class ReadLayer(UniCompressLayer):
    """The common base of the two layers for reading."""

    stride: int | None = None
    """The stride at which images are read now, if the adapter is trained for several. None: the one in the middle."""

    def __init__(self, base_layer: nn.Module, family: Family):
        super().__init__(base_layer, family)
        self.guard = family.base.register_forward_pre_hook(self._refuse_drawn, with_kwargs=True)

    @contextmanager
    def at_stride(self, stride: int | None) -> Iterator[None]:
        """Reads images at this stride while the context is open."""
        before, self.stride = self.stride, stride
        try:
            yield
        finally:
            self.stride = before

    def unload_and_optionally_merge_module(self, *args, **kwargs) -> nn.Module:
        self.guard.remove()
        return super().unload_and_optionally_merge_module(*args, **kwargs)

    def _refuse_drawn(self, base: nn.Module, args: tuple, kwargs: dict) -> None:
        """Refuses images to draw. The base ignores unknown arguments, so it would read them and learn placeholders as text."""
        unsupported = [name for name in kwargs if name.startswith(("gen_", "teacher_"))]
        if unsupported:
            raise UnsupportedError(
                f"{', '.join(unsupported)} were passed to the base model, which does not support them; expected a "
                "UniCompressModel. Make it with get_uc_model(base, config) or UniCompressModel.from_pretrained(...): a plain "
                "PeftModel can only read images."
            )

    @abstractmethod
    def image_embeddings(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None) -> list[torch.Tensor]:
        """Returns the language model's inputs for each of the images (N, 3, H, W), as a list of N (N_g + 1 + T', D)."""

    def embed_prompt(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        image_sizes: torch.Tensor | None,
        read_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Returns token embeddings (B, L, D), with the images to read at the placeholders in `read_mask` (B, L)."""
        embeddings = self.family.base.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return embeddings
        images = torch.cat(self.image_embeddings(pixel_values, image_sizes))  # (N * P, D)
        return embeddings.masked_scatter(read_mask.unsqueeze(-1), images.to(embeddings.dtype))

    def encode_for_generate(self, kwargs: dict) -> dict:
        """Returns the arguments of the base's `generate`, with the images encoded if the base cannot do it itself."""
        return kwargs


class FeatureReadLayer(ReadLayer):
    """The layer around an aligner. It compresses the aligner's input features."""

    module_class = ReadCompressor

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        module = self.active_module()
        if module is not None:
            side = self.family.geometry.read_side
            x = module(x.to(module.separator.dtype), (side, side), self.stride).to(x.dtype)  # (B, T, C) -> (B, N_g + 1 + T', C)
        return self.base_layer(x, *args, **kwargs)

    def image_embeddings(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None) -> list[torch.Tensor]:
        return list(self.family.base.model.get_image_features(pixel_values, return_dict=True).pooler_output)


class DrawLayer(UniCompressLayer):
    """The layer around a generation head. It stores the drawing module; the drawing loop calls the base layer directly."""

    module_class = DrawCompressor

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.active_module() is not None:
            raise UnsupportedError(
                "The base's own drawing loop would draw dense tokens with a model tuned for compact tokens; expected a "
                "UniCompressModel. Call UniCompressModel.from_pretrained(base, adapter).generate(..., "
                "generation_mode='image')."
            )
        return self.base_layer(x, *args, **kwargs)


@dataclass
class CompactFeatures(BaseModelOutputWithPooling):
    """Compact images in the form of the base's encoded images. The class marks them, so that they are not compressed twice."""


class CodeReadLayer(ReadLayer):
    """The layer around a VQ tokenizer's encoder. It stores the reading module; a hook of the model compresses its input."""

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
        """Encodes the images first. transformers would encode them densely, and count their placeholders by that."""
        return self._encode(kwargs) if kwargs.get("pixel_values") is not None else kwargs

    def _encode(self, kwargs: dict) -> dict:
        """Replaces the pixels in the base's arguments with compact images."""
        images = self._pack(self.image_embeddings(kwargs["pixel_values"], kwargs.get("image_sizes")))
        others = {name: value for name, value in kwargs.items() if name not in ("pixel_values", "image_sizes")}
        return others | {"mm_encoder_outputs": {"image": images}}

    def _compress(self, codes: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Compresses codes (B, T) to (B, N_g + 1 + T', D), in the language model's dtype."""
        module, family = self.active_module(), self.family
        dtype, embeddings = module.separator.dtype, family.embed_codes(codes)
        entries = family.codebook[codes].to(dtype)
        return module(embeddings.to(dtype), entries, grid, self.stride).to(embeddings.dtype)

    def _pack(self, embeddings: list[torch.Tensor]) -> CompactFeatures:
        """Packs images as the base's own encoder does: a list if images have any size, else one tensor."""
        any_size = self.family.geometry.image_size is None
        return CompactFeatures(pooler_output=embeddings if any_size else torch.stack(embeddings))

    def _compress_inputs(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Compresses, before the model's forward, pixels, or images that transformers' `generate` encoded densely."""
        images = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if self.active_module() is None or isinstance(images, CompactFeatures):
            return None
        if images is not None:
            input_ids, stride = kwargs.get("input_ids"), self.stride or self.active_module().default_stride
            grids = self.family.encoded_codes(images, input_ids, stride)  # N times (H, W)
            compact = [self._compress(codes.flatten()[None], tuple(codes.shape))[0] for codes in grids]
            self._check_repeats(input_ids, compact)
            return args, kwargs | {"mm_encoder_outputs": {"image": self._pack(compact)}}
        return None if kwargs.get("pixel_values") is None else (args, self._encode(kwargs))

    def _check_repeats(self, input_ids: torch.Tensor | None, images: list[torch.Tensor]) -> None:
        """Refuses images that transformers repeated for beams or several sequences: it repeats by the dense lengths."""
        if input_ids is None:
            return
        placeholders, compact = int((input_ids == self.family.image_token_id).sum()), sum(map(len, images))
        if placeholders > compact and placeholders % compact == 0:
            raise UnsupportedError(ONE_ANSWER.format(f"{placeholders // compact} answers a prompt"))


class DenseReadLayer(ReadLayer):
    """The layer of a base that reads images as its own codes. A hook of the model puts the codes into the token ids."""

    module_class = NoReadCompressor

    def __init__(self, base_layer: nn.Module, family: Family):
        super().__init__(base_layer, family)
        self.hook = family.base.model.register_forward_pre_hook(self._read_codes, with_kwargs=True)

    def unload_and_optionally_merge_module(self, *args, **kwargs) -> nn.Module:
        self.hook.remove()
        return super().unload_and_optionally_merge_module(*args, **kwargs)

    def image_codes(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None) -> list[torch.Tensor]:
        """Returns the base's own codes of each of the images (N, 3, H, W), as a list of N (T,)."""
        codes: dict[int, torch.Tensor] = {}
        for rows, pixels, _ in self.family.by_size(pixel_values, image_sizes):
            codes.update(zip(rows, self.family.dense_codes(pixels), strict=True))
        return [codes[row] for row in range(len(pixel_values))]

    def image_embeddings(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None) -> list[torch.Tensor]:
        return [self.family.embed_codes(codes) for codes in self.image_codes(pixel_values, image_sizes)]

    def _read_codes(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Reads the images that the adapter's processor prepared. The base's own inputs stay as they are."""
        pixel_values, image_sizes = kwargs.get("pixel_values"), kwargs.get("image_sizes")
        if self.active_module() is None or pixel_values is None or image_sizes is None:
            return None
        family, ids, mask = self.family, kwargs["input_ids"], kwargs.get("attention_mask")
        places = ids == family.image_token_id
        mask = torch.ones_like(ids) if mask is None else mask
        others = {name: value for name, value in kwargs.items() if name not in ("pixel_values", "image_sizes")}
        others["input_ids"] = ids.masked_scatter(
            places, family.code_token_ids[torch.cat(self.image_codes(pixel_values, image_sizes))]
        )
        if kwargs.get("position_ids") is None:
            others["position_ids"] = sequence_positions(mask, dense_reading(family, Images(pixel_values, image_sizes), places))
        return args, others


ONE_ANSWER = (
    "{} through a plain PeftModel or transformers' own generate; expected one answer a prompt and no beams, since they would "
    "repeat this base's images wrongly. Load the adapter with UniCompressModel.from_pretrained(base, adapter), which supports "
    "several answers and beams."
)


class CodeDrawLayer(UniCompressLayer):
    """The layer in a VQ tokenizer that stores the drawing module, for bases whose text head also generates the codes."""

    module_class = DrawCompressor

    def train(self, mode: bool = True) -> CodeDrawLayer:
        return _train_beside(self, mode)


def _train_beside(layer: UniCompressLayer, mode: bool) -> UniCompressLayer:
    """Sets the training mode of the adapters alone. A batch norm in the frozen tokenizer would drift with every batch."""
    nn.Module.train(layer, mode)
    layer.base_layer.train(False)
    return layer


def layer_classes(family: Family | type[Family]) -> dict[str, type[UniCompressLayer]]:
    """Returns the layer class for each role of the family: "read", and "draw" if it draws."""
    if not family.shared_vocabulary:
        layers = {"read": FeatureReadLayer, "draw": DrawLayer}
    else:
        layers = {"read": CodeReadLayer if family.compresses_reading else DenseReadLayer, "draw": CodeDrawLayer}
    return {role: layer for role, layer in layers.items() if role in family.module_names}
