"""GLM-Image: draws a small preview, and then the image. A diffusion model outside the base turns the codes into pixels."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoProcessor,
    BatchFeature,
    GenerationConfig,
    GlmImageProcessor,
    ProcessorMixin,
)

from ..errors import InputError
from ..layers import Grid, unit
from .family import exact, weight_of
from .shared_vocabulary import AnySizeFamily

if TYPE_CHECKING:
    from PIL.Image import Image

PREVIEW_SIDE = 16  # side of the preview of a square image
PIXELS = 32  # side of a code in the finished picture; the vision encoder sees the picture at half of its size


class GlmImage(AnySizeFamily):
    """The family of `GlmImageForConditionalGeneration`.

    Images to read, for editing, stay as they are. All their codes are read in one pass, so that fewer of them save little time
    beside the steps of the drawing. And an edit repeats most codes of its source, which a compact form would blur.

    Sizes in pixels are those that the vision encoder sees, which are half of those of the finished picture.
    """

    model_type = "glm_image"
    model_class = "GlmImageForConditionalGeneration"
    processor_class = "GlmImageProcessor"
    module_names = {
        "language model": "model.language_model",
        "tokenizer": "model.vqmodel",
        "read": "model.visual.patch_embed",
        "draw": "model.vqmodel.quant_conv",
    }
    target_modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
    compresses_reading = False
    guides_edits = False  # a prompt without its images would announce a preview
    why_no_answers = "its head scores codes alone"
    why_no_pixels = "a diffusion model outside the base makes them, diffusers' GlmImagePipeline"
    base_subfolder = "vision_language_encoder"
    example_grid = (32, 32)
    question_snippet = ""
    drawing_snippet = """\
inputs = processor(text=[prompt], target_h=1024, target_w=1024, return_tensors="pt").to(device)
tokens = model.generate(**inputs, generation_mode="image", do_sample=True, temperature=0.9, top_p=0.75)
codes = tokens[:, -32 * 32 :].view(1, 1, 32, 32)  # the preview's codes come before those of the image
codes = codes.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(1)  # the diffusion model has four places for a code

from diffusers import GlmImagePipeline  # pip install "uc-adapters[diffusers]"

pipeline = GlmImagePipeline.from_pretrained("zai-org/GLM-Image", vision_language_encoder=None, dtype="auto").to(device)
image = pipeline(prompt=prompt, prior_token_ids=codes, height=1024, width=1024).images[0]"""

    def __init__(self, base: nn.Module):
        self.base = base
        config = base.config
        self.image_token_id = config.image_token_id
        self._factor = config.vision_config.patch_size
        self.geometry = self._geometry(num_codes=config.vq_config.num_embeddings, code_width=config.vq_config.embed_dim)

    # Prompts ---------------------------------------------------------------------------------------------------------

    @staticmethod
    def prompt_text(processor: ProcessorMixin, text: str, to_draw: bool) -> str:
        """Returns the text as it is: the processor adds only the grids of an image to draw, which begin the image."""
        return text

    @staticmethod
    def image_tokens(processor: ProcessorMixin) -> tuple[str, ...]:
        end = processor.tokenizer.eos_token
        return processor.image_token, processor.bos_token, end, processor.grid_bos_token, processor.grid_eos_token

    @staticmethod
    def reading_text(processor: ProcessorMixin, read: Mapping[str, torch.Tensor], index: int) -> str:
        return processor.image_token * math.prod((read["image_sizes"][index] // processor.image_processor.patch_size).tolist())

    @staticmethod
    def drawing_texts(processor: ProcessorMixin, drawn: Mapping[str, torch.Tensor], first: int, count: int) -> list[str]:
        patch = processor.image_processor.patch_size
        grids = (drawn["image_sizes"][first : first + count] // patch).tolist()
        wrapper = "".join(f"{processor.grid_bos_token}{h} {w}{processor.grid_eos_token}" for h, w in reversed(grids))
        front = getattr(processor, "num_global_tokens", -1) + 1  # with the separator; the base's processor has neither
        first_text, *others = (processor.image_token * (front + rows * columns) for rows, columns in grids)
        return [f"{wrapper}{processor.bos_token}{first_text}", *others]

    @staticmethod
    def wrapper_places(processor: ProcessorMixin, prompt: list[int]) -> list[bool]:
        begin, end = processor.tokenizer.convert_tokens_to_ids([processor.grid_bos_token, processor.grid_eos_token])
        start = len(prompt) - 1  # the begin of the image; before it there is one grid, or two
        while prompt[start - 1] == end:
            start -= 1 + prompt[start - 1 :: -1].index(begin)
        return [index >= start for index in range(len(prompt))]

    # Images ----------------------------------------------------------------------------------------------------------

    @staticmethod
    def image_inputs(processor: ProcessorMixin, images: list[Image], **kwargs) -> dict[str, torch.Tensor]:
        return unpacked(processor, processor.image_processor(images, return_tensors="pt", **kwargs))

    @staticmethod
    def preview_inputs(processor: ProcessorMixin, images: list[Image]) -> dict[str, torch.Tensor]:
        patch = processor.image_processor.patch_size
        grids = processor.image_processor(images, return_tensors="pt")["image_grid_thw"][:, 1:].tolist()
        sizes = [(patch * columns, patch * rows) for rows, columns in map(GlmImage.preview_grid, grids)]
        previews = [image.resize(size) for image, size in zip(images, sizes, strict=True)]
        return GlmImage.image_inputs(processor, previews, do_resize=False)

    @staticmethod
    def preview_grid(grid: Grid) -> Grid:
        """Returns the preview's grid as the base's processor computes it."""
        ratio = grid[0] / grid[1]
        return int(math.sqrt(ratio) * PREVIEW_SIDE), int(math.sqrt(1 / ratio) * PREVIEW_SIDE)

    def code_positions(self, grid: Grid) -> torch.Tensor:
        """Returns the position ids on the axes of time, rows and columns, (3, T + 1).

        All codes of an image have one time. The token after the image has the same position on all axes, after the longer side.
        """
        rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
        codes = torch.stack([torch.zeros_like(rows), rows, columns]).flatten(1)  # (3, T)
        return F.pad(codes, (0, 1), value=max(grid))

    # Codes -----------------------------------------------------------------------------------------------------------

    def token_ids_of_codes(self) -> torch.Tensor:
        return torch.arange(self.geometry.num_codes)

    @property
    def codebook(self) -> torch.Tensor:
        return self.code_space(weight_of(self.base.model.vqmodel.quantize.embedding).detach().float())

    @exact
    @torch.no_grad()
    def latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        model, (height, width), patch = self.base.model, pixel_values.shape[2:], self._factor
        grid = height // patch, width // patch
        patches = pixel_values.unflatten(3, (grid[1], patch)).unflatten(2, (grid[0], patch))  # (B, 3, h, p, w, p)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)  # (B * h * w, 3 * p * p)
        grids = torch.tensor([(1, *grid)] * len(pixel_values), device=pixel_values.device)
        features = model.visual(patches.to(model.visual.dtype), grid_thw=grids, return_dict=True).pooler_output
        features = features.unflatten(0, (len(pixel_values), *grid)).permute(0, 3, 1, 2)  # (B, C', h, w)
        return self.code_space(model.vqmodel.quant_conv(features).flatten(2).transpose(1, 2).float())

    def code_space(self, x: torch.Tensor) -> torch.Tensor:
        return unit(x)  # GLM-Image compares by cosine similarity

    def language_model(self, **inputs):
        return self.base.model.language_model(**inputs)

    # Drawing ---------------------------------------------------------------------------------------------------------

    def prompt_inputs(
        self, processor: CompactGlmImageProcessor, texts: list[str], height: int | None = None, width: int | None = None
    ) -> BatchFeature:
        size = (processor.target_h if height is None else height, processor.target_w if width is None else width)
        if any(not isinstance(side, int) or side < PIXELS or side % PIXELS for side in size):
            raise InputError(f"height={height}, width={width}; expected multiples of {PIXELS} pixels, which one code takes.")
        return processor(text=texts, padding=True, return_tensors="pt", target_h=size[0], target_w=size[1])

    def wrapper_mask(self, input_ids: torch.Tensor, generation_config: GenerationConfig) -> torch.Tensor:
        """Finds the grids at the end of a prompt. The config does not name their wrapper tokens, but both grids have them."""
        wrapper = torch.zeros_like(input_ids, dtype=torch.bool)
        wrapper[:, -2:] = True
        for row, ids in enumerate(input_ids):
            ends = (ids[:-2] == ids[-2]).nonzero()  # the end of the image's grid, if the preview's follows it
            if len(ends):
                begin = ids[ends[-1, 0] + 1]
                wrapper[row, (ids == begin).nonzero()[-2:][0, 0] :] = True
        return wrapper

    def boi_token_id(self, generation_config: GenerationConfig) -> int:
        return self.base.config.image_start_token_id

    def prompt_grids(self, count: int, image_sizes: torch.Tensor | None) -> list[Grid]:
        """Returns the grid of each image to draw, without its preview. `image_sizes` (count, 2) are in pixels."""
        given = None if image_sizes is None else tuple(image_sizes.shape)
        if given != (count, 2):
            raise InputError(
                f"gen_image_sizes of shape {given} for {count} prompt(s); expected ({count}, 2), the size of each image. "
                "Pass on all that the adapter's processor returns; model.compact_processor(processor) makes it."
            )
        return [self.draw_grid((int(height), int(width))) for height, width in image_sizes]

    def compact_processor(self, processor: ProcessorMixin, stride: int, num_global_tokens: int) -> ProcessorMixin:
        return CompactGlmImageProcessor(
            copy.deepcopy(processor.image_processor),
            copy.deepcopy(processor.tokenizer),
            chat_template=processor.chat_template,
            num_global_tokens=num_global_tokens,
            target_h=processor.target_h,
            target_w=processor.target_w,
        )


class CompactGlmImageProcessor(GlmImageProcessor):
    """GLM-Image's processor for an adapter. Its prompts are the base's own, and only what it returns beside the ids differs.

    It returns `gen_image_sizes` (B, 2), the sizes of the images to draw in pixels. Images to read are `pixel_values`
    (N, 3, H, W) and `image_sizes` (N, 2).

    Args:
        image_processor: The base's image processor.
        tokenizer: The base's tokenizer.
        chat_template: The base's chat template.
        num_global_tokens: The adapter's N_g. Default 4.
        target_h: Height of the pictures to draw if a call does not give it. Default: the base's own.
        target_w: Width likewise.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        num_global_tokens: int = 4,
        target_h: int = GlmImageProcessor.target_h,
        target_w: int = GlmImageProcessor.target_w,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.num_global_tokens = num_global_tokens
        self.target_h, self.target_w = target_h, target_w

    def __call__(self, images=None, text=None, **kwargs) -> BatchFeature:
        inputs = super().__call__(images=images, text=text, **kwargs)
        if text is None:
            return BatchFeature(unpacked(self, inputs))
        grids, counts = inputs.pop("image_grid_thw"), inputs.pop("images_per_sample")
        per_prompt = grids.view(len(counts), -1, 3)  # the images to read, the image to draw; or the image to draw, its preview
        to_draw = per_prompt[:, 0 if images is None else -1, 1:]
        inputs["gen_image_sizes"] = to_draw * self.image_processor.patch_size
        if images is not None:
            read = per_prompt[:, :-1].flatten(0, 1)
            inputs.update(unpacked(self, {"pixel_values": inputs["pixel_values"], "image_grid_thw": read}))
        return inputs


# AutoProcessor finds the class by the name in a saved folder; the first argument does not matter for that
AutoProcessor.register(CompactGlmImageProcessor, CompactGlmImageProcessor)


def unpacked(processor: ProcessorMixin, prepared: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Makes `pixel_values` (N, 3, H, W) and `image_sizes` (N, 2) of the packed patches of images."""
    patch, grids = processor.image_processor.patch_size, prepared["image_grid_thw"][:, 1:]
    side = (patch * grids).amax(0).tolist()
    pixels = prepared["pixel_values"].new_zeros(len(grids), 3, *side)
    for image, patches, (rows, columns) in zip(
        pixels, prepared["pixel_values"].split(grids.prod(1).tolist()), grids.tolist(), strict=True
    ):
        raster = patches.view(rows, columns, 3, patch, patch).permute(2, 0, 3, 1, 4)  # (3, h, p, w, p)
        image[:, : rows * patch, : columns * patch] = raster.flatten(3).flatten(1, 2)
    return {"pixel_values": pixels, "image_sizes": patch * grids}
