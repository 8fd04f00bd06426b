"""Apertus 1.5: images have any size, their codes are input tokens, and an EOL token separates their rows. It only reads."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import Apertus1p5Processor, AutoProcessor, ProcessorMixin

from ..errors import InputError
from .family import exact
from .shared_vocabulary import AnySizeFamily


class Apertus1p5(AnySizeFamily):
    """The family of `Apertus1p5ForConditionalGeneration`."""

    model_type = "apertus1p5"
    model_class = "Apertus1p5ForConditionalGeneration"
    processor_class = "Apertus1p5Processor"
    module_names = {
        "language model": "model.language_model",
        "tokenizer": "model.vision_tokenizer",
        "read": "model.vision_tokenizer.quant_conv",  # not the encoder: the base looks up a layer inside the encoder
    }
    target_modules = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    example_grid = (64, 64)
    why_no_drawing = "Apertus 1.5 has no decoder from codes to pixels, and its head scores text tokens alone"

    def __init__(self, base: nn.Module):
        self.base = base
        config, vision = base.config, base.config.vision_config
        self.image_token_id = config.image_token_id
        self._factor = vision.spatial_scale_factor
        self.geometry = self._geometry(num_codes=vision.codebook_size, code_width=vision.embed_dim)

    @staticmethod
    def image_tokens(processor: ProcessorMixin) -> tuple[str, ...]:
        return processor.image_token, processor.boi_token, processor.eoi_token

    def token_ids_of_codes(self) -> torch.Tensor:
        return torch.arange(self.geometry.num_codes) + self.base.config.image_token_offset

    @exact
    @torch.no_grad()
    def latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        tokenizer = self.base.model.vision_tokenizer
        latents = tokenizer.quant_conv(tokenizer.encoder(pixel_values.to(tokenizer.dtype)))  # (B, C, H, W)
        return latents.flatten(2).transpose(1, 2).float()

    @exact
    @torch.no_grad()
    def dense_codes(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Returns the base's own codes, (B, T), of pixels (B, 3, H, W).

        The base compares by inner product, so the nearest entry may be another one. It encodes one image at a time, since the
        scores of one large image take gigabytes.
        """
        encode = self.base.model.vision_tokenizer.encode
        return torch.cat([encode(image[None]).image_tokens.flatten(1) for image in pixel_values])

    def encoded_codes(self, encoded, input_ids: torch.Tensor | None, stride: int) -> list[torch.Tensor]:
        """Returns the codes (H, W) of each image. They come flat, and the prompt tells the number of their rows."""
        codes = [tokens - self.base.config.image_token_offset for tokens in encoded.image_tokens]
        rows = [stride * count for count in self._compact_rows(input_ids)]
        if len(rows) != len(codes) or any(len(image) % count for image, count in zip(codes, rows, strict=True)):
            raise InputError(
                f"Prompts with images of {rows} rows of codes for encoded images of {[len(image) for image in codes]} codes; "
                "expected input_ids that the adapter's processor made of these images, each once. Pass what "
                "processor(text=..., images=...) returns. Beams and several answers need UniCompressModel.from_pretrained."
            )
        return [image.unflatten(0, (count, -1)) for image, count in zip(codes, rows, strict=True)]

    def _compact_rows(self, input_ids: torch.Tensor | None) -> list[int]:
        """Returns the number of rows of placeholders of each image in prompts (B, L).

        A single token, EOL, separates the placeholders of two rows. Several tokens separate those of two images.
        """
        places = [] if input_ids is None else (input_ids.flatten() == self.image_token_id).nonzero().flatten().tolist()
        counts: list[int] = []
        for before, place in zip([-3, *places], places, strict=False):
            if place - before > 2:
                counts.append(1)
            elif place - before == 2:
                counts[-1] += 1
        return counts

    def language_model(self, **inputs):
        return self.base.model.language_model(**inputs)

    def compact_processor(self, processor: ProcessorMixin, stride: int, num_global_tokens: int) -> ProcessorMixin:
        image_processor = copy.deepcopy(processor.image_processor)
        image_processor.spatial_factor = self._factor * stride  # resizes to grids that the stride divides
        return CompactApertus1p5Processor(
            image_processor,
            copy.deepcopy(processor.feature_extractor),
            copy.deepcopy(processor.tokenizer),
            chat_template=processor.chat_template,
            stride=stride,
            num_global_tokens=num_global_tokens,
        )


class CompactApertus1p5Processor(Apertus1p5Processor):
    """Apertus 1.5's processor for an adapter. An image has N_g + 1 + T / s^2 placeholders, and EOL tokens between its rows.

    Args:
        image_processor: The base's image processor, with a `spatial_factor` of pixels for each compact token.
        feature_extractor: The base's feature extractor, for audio.
        tokenizer: The base's tokenizer.
        chat_template: The base's chat template.
        stride: The adapter's stride. Default 2.
        num_global_tokens: The adapter's N_g. Default 4.
    """

    def __init__(
        self,
        image_processor=None,
        feature_extractor=None,
        tokenizer=None,
        chat_template=None,
        stride: int = 2,
        num_global_tokens: int = 4,
        **kwargs,
    ):
        super().__init__(image_processor, feature_extractor, tokenizer, chat_template=chat_template, **kwargs)
        self.stride, self.num_global_tokens = stride, num_global_tokens

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """Returns the text of one image: its begin and dense size, G and separator, the rows of compact tokens, and its end."""
        height, width = image_inputs["image_sizes"][image_idx]
        rows, columns = (int(side) // self.image_processor.spatial_factor for side in (height, width))
        return (
            f"{self.boi_token}{rows * self.stride}*{columns * self.stride}{self.image_wrapper_token}"
            f"{self.image_token * (self.num_global_tokens + 1)}"
            f"{self.eol_token.join([self.image_token * columns] * rows)}{self.eoi_token}"
        )


# AutoProcessor finds the class by the name in a saved folder; the first argument does not matter for that
AutoProcessor.register(CompactApertus1p5Processor, CompactApertus1p5Processor)
