"""Emu3: images have any size, their codes share the vocabulary with text, and an EOL token follows each row of codes."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoProcessor, BatchFeature, Emu3Processor, GenerationConfig, ProcessorMixin

from ..errors import BaseModelError, InputError
from ..layers import Grid
from .family import exact, weight_of
from .shared_vocabulary import AnySizeFamily


class Emu3(AnySizeFamily):
    """The family of `Emu3ForConditionalGeneration`."""

    model_type = "emu3"
    model_class = "Emu3ForConditionalGeneration"
    processor_class = "Emu3Processor"
    module_names = {
        "language model": "model.text_model",
        "tokenizer": "model.vqmodel",
        "read": "model.vqmodel.encoder",
        "draw": "model.vqmodel.quant_conv",
    }
    has_eol = True
    example_grid = (90, 90)
    drawing_snippet = """\
inputs = processor(text=[prompt], return_for_image_generation=True, ratio="1:1", return_tensors="pt").to(device)
tokens = model.generate(**inputs, generation_mode="image", do_sample=True, guidance_scale=3.0)
height, width = inputs["image_sizes"][0]
pixels = model.decode_image_tokens(image_tokens=tokens, height=height, width=width).float().cpu()
image = processor.postprocess(list(pixels))["pixel_values"][0]"""

    def __init__(self, base: nn.Module):
        self.base = base
        config = base.config
        vocabulary = config.vocabulary_map
        names = ("<image>", "<|image start|>", "<|image token|>", "<|image end|>", "<|extra_200|>", "<|extra_201|>")
        missing = [name for name in names if name not in vocabulary]
        if missing:
            raise BaseModelError(
                f"config.vocabulary_map lacks {', '.join(map(repr, missing))}; expected all special tokens of images. Load the "
                "config that the base was published with."
            )
        self.image_token_id, self._start, self._wrapper, self._end, self._eol, self._file_end = map(vocabulary.get, names)
        self._factor = base.model.vqmodel.vision_spatial_factor
        self.geometry = self._geometry(num_codes=config.vq_config.codebook_size, code_width=config.vq_config.embed_dim)

    @exact
    @torch.no_grad()
    def latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        vqmodel = self.base.model.vqmodel
        frames = vqmodel.config.temporal_downsample_factor  # the encoder takes films: so many frames give one latent
        film = pixel_values.to(vqmodel.dtype).unsqueeze(1).repeat(1, frames, 1, 1, 1)  # (B, frames, 3, H, W)
        hidden = vqmodel.encoder(film).permute(0, 2, 1, 3, 4)  # (B, 1, C, h, w) -> (B, C, 1, h, w)
        return vqmodel.quant_conv(hidden).flatten(2).transpose(1, 2).float()  # (B, T, C)

    def encoded_codes(self, encoded, input_ids: torch.Tensor | None, stride: int) -> list[torch.Tensor]:
        return list(encoded.image_tokens)

    def language_model(self, **inputs):
        return self.base.model.text_model(**inputs)

    def prompt_inputs(
        self, processor: CompactEmu3Processor, texts: list[str], height: int | None = None, width: int | None = None
    ) -> BatchFeature:
        area = min(processor.image_area, processor.image_processor.max_pixels)  # the published one's, or a smaller base's
        rows, columns = processor.calculate_generate_size(processor.ratio, area, self._factor)
        size = (rows * self._factor if height is None else height, columns * self._factor if width is None else width)
        unit = self._factor * processor.stride
        if any(not isinstance(side, int) or side < unit or side % unit for side in size):
            raise InputError(
                f"height={height}, width={width}; expected multiples of {unit} pixels: a code is {self._factor} pixels wide, "
                f"and the adapter's stride is {processor.stride}."
            )
        return processor(
            text=texts,
            padding=True,
            return_tensors="pt",
            return_for_image_generation=True,
            ratio=f"{size[1]}:{size[0]}",
            image_area=size[0] * size[1],
        )

    def wrapper_mask(self, input_ids: torch.Tensor, generation_config: GenerationConfig) -> torch.Tensor:
        start = input_ids == self._start
        last = start.flip(1).cumsum(1).flip(1) == 0  # tokens after the start of the last image: its size, and its begin
        return start | last | (input_ids == generation_config.bos_token_id)

    def boi_token_id(self, generation_config: GenerationConfig) -> int:
        return self._wrapper

    def prompt_grids(self, count: int, image_sizes: torch.Tensor | None) -> list[Grid]:
        """Returns the grid of each image to draw; raises InputError unless each prompt has one, with at least one token."""
        given = None if image_sizes is None else tuple(torch.as_tensor(image_sizes).shape)
        if given != (count, 2):
            raise InputError(
                f"image_sizes of shape {given} for {count} prompt(s); expected ({count}, 2), the rows and columns of each "
                "image in tokens. Pass what processor(text=..., return_for_image_generation=True) returns."
            )
        grids = [(int(rows), int(columns)) for rows, columns in image_sizes]
        if min(map(min, grids)) < 1:
            raise InputError(f"image_sizes of {grids}; expected rows and columns of 1 or more. Use the processor's.")
        return grids

    @property
    def eol(self) -> torch.Tensor:
        return weight_of(self.base.get_input_embeddings())[self._eol]

    def to_tokens(self, codes: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Turns codes (B, H * W) into tokens (B, H * (W + 1) + 3): rows with EOL tokens, end of file, of image, of sequence."""
        rows = F.pad(self.code_token_ids[codes].unflatten(1, grid), (0, 1), value=self._eol)  # (B, H, W + 1)
        tokens = F.pad(rows.flatten(1), (0, 3), value=self.base.config.text_config.eos_token_id)
        tokens[:, -3], tokens[:, -2] = self._file_end, self._end
        return tokens

    def to_pixels(self, tokens: torch.Tensor, grid: Grid) -> torch.Tensor:
        return self.base.decode_image_tokens(image_tokens=tokens, height=grid[0], width=grid[1])

    def compact_processor(self, processor: ProcessorMixin, stride: int, num_global_tokens: int) -> ProcessorMixin:
        return CompactEmu3Processor(
            copy.deepcopy(processor.image_processor),
            copy.deepcopy(processor.tokenizer),
            chat_template=processor.chat_template,
            stride=stride,
            num_global_tokens=num_global_tokens,
        )


class CompactEmu3Processor(Emu3Processor):
    """Emu3's processor for an adapter. An image has N_g + 1 + T / s^2 placeholders, with EOL tokens between their rows.

    Images to read are resized to grids that the stride divides, and images to draw get such grids.

    Args:
        image_processor: The base's image processor.
        tokenizer: The base's tokenizer.
        chat_template: The base's chat template.
        stride: The adapter's stride. Default 2.
        num_global_tokens: The adapter's N_g. Default 4.
    """

    def __init__(self, image_processor, tokenizer, chat_template=None, stride: int = 2, num_global_tokens: int = 4, **kwargs):
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.stride, self.num_global_tokens = stride, num_global_tokens
        self.image_processor.spatial_factor = self.downsample_ratio * stride

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """Returns the text of one image: its start and dense size, G and separator, the rows of compact tokens, and its end."""
        rows, columns = (int(side) // self.downsample_ratio for side in image_inputs["image_sizes"][image_idx])
        row = self.image_token * (columns // self.stride) + self.tokenizer.eol_token
        return (
            f"{self.image_start_token}{rows}*{columns}{self.fake_token_around_image}"
            f"{self.image_token * (self.num_global_tokens + 1)}"
            f"{row * (rows // self.stride)}"
            f"{self.eof_token}{self.image_end_token}"
        )

    def calculate_generate_size(self, ratio: str, image_area: int, spatial_factor: int) -> tuple[int, int]:
        """Returns rows and columns of tokens to draw, the nearest ones that the stride divides."""
        rows, columns = super().calculate_generate_size(ratio, image_area, spatial_factor * self.stride)
        return max(1, rows) * self.stride, max(1, columns) * self.stride


# AutoProcessor finds the class by the name in a saved folder; the first argument does not matter for that
AutoProcessor.register(CompactEmu3Processor, CompactEmu3Processor)
