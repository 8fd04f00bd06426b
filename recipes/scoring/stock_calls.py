"""Draws as each base's own documentation does, with the bare base or with an adapter on it.

The calls that differ between families of bases are here, so that the recipes are the same for all.
"""

from __future__ import annotations

import torch
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from uc_adapters import UniCompressModel
from uc_adapters.families import family_of
from uc_adapters.layers import Grid


class JanusCalls:
    """The calls of Janus: images have one size, and `generate` itself draws."""

    def prompts(self, processor: ProcessorMixin, texts: list[str], **kwargs) -> BatchFeature:
        """The inputs of prompts to draw."""
        return processor(text=texts, padding=True, return_tensors="pt", generation_mode="image", **kwargs)

    def draw(self, model: PreTrainedModel, inputs: BatchFeature, **sampling) -> torch.Tensor:
        """Draws; returns the base's tokens of each image, (B, ...)."""
        return model.generate(**inputs, generation_mode="image", **sampling)

    def grid(self, model: PreTrainedModel, inputs: BatchFeature) -> Grid:
        """The grid of the images' codes."""
        side = family_of(base_of(model)).geometry.draw_side
        return side, side


class Emu3Calls:
    """The calls of Emu3: the prompt gives the image size, and the documented constraint keeps text tokens out of images."""

    def prompts(self, processor: ProcessorMixin, texts: list[str], **kwargs) -> BatchFeature:
        area = min(processor.image_area, processor.image_processor.max_pixels)  # the documented area, or a tiny base's
        kwargs = {"return_for_image_generation": True, "image_area": area, **kwargs}
        return processor(text=texts, padding=True, return_tensors="pt", **kwargs)

    def draw(self, model: PreTrainedModel, inputs: BatchFeature, guidance_scale: float = 1.0, **sampling) -> torch.Tensor:
        if isinstance(model, UniCompressModel):
            return model.generate(**inputs, generation_mode="image", guidance_scale=guidance_scale, **sampling)
        family, ids = family_of(model), inputs["input_ids"]
        rows, columns = inputs["image_sizes"][0]
        if guidance_scale > 1:  # the unconditional prompt that caption dropout trains
            blank = family.unconditional(ids, model.generation_config)
            sampling |= {"negative_prompt_ids": blank, "negative_prompt_attention_mask": inputs["attention_mask"]}
        codes = family.code_token_ids.tolist()
        eol, *end = family.to_tokens(torch.zeros(1, rows * columns, dtype=torch.long), (rows, columns))[0, -4:].tolist()

        def allowed(_, sequence: torch.Tensor) -> list[int]:
            drawn = len(sequence) - ids.shape[1]
            if drawn < rows * (columns + 1):
                return [eol] if drawn % (columns + 1) == columns else codes
            return [end[min(drawn - rows * (columns + 1), 2)]]

        sequences = model.generate(
            input_ids=ids,
            attention_mask=inputs["attention_mask"],
            max_new_tokens=rows * (columns + 1) + 3,
            guidance_scale=guidance_scale,
            prefix_allowed_tokens_fn=allowed,
            **sampling,
        )
        return sequences[:, ids.shape[1] :]

    def grid(self, model: PreTrainedModel, inputs: BatchFeature) -> Grid:
        return tuple(inputs["image_sizes"][0])


class GlmImageCalls:
    """The calls of GLM-Image: `generate` draws whatever it is asked, a preview before the image. It has no pixels."""

    def prompts(self, processor: ProcessorMixin, texts: list[str], **kwargs) -> BatchFeature:
        return processor(text=texts, padding=True, return_tensors="pt", **kwargs)

    def draw(self, model: PreTrainedModel, inputs: BatchFeature, **sampling) -> torch.Tensor:
        if isinstance(model, UniCompressModel):
            return model.generate(**inputs, generation_mode="image", **sampling)
        drawn = inputs["image_grid_thw"][: inputs["images_per_sample"][0]].prod(1).sum()
        sequences = model.generate(**inputs, max_new_tokens=int(drawn), **sampling)
        return sequences[:, inputs["input_ids"].shape[1] :]

    def grid(self, model: PreTrainedModel, inputs: BatchFeature) -> Grid:
        if "gen_image_sizes" in inputs:
            return family_of(base_of(model)).prompt_grids(len(inputs["input_ids"]), inputs["gen_image_sizes"])[0]
        return tuple(inputs["image_grid_thw"][0, 1:].tolist())


CALLS = {"janus": JanusCalls(), "emu3": Emu3Calls(), "glm_image": GlmImageCalls()}


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """The base of a model: the model itself, or what its adapter is on."""
    return model.get_base_model() if isinstance(model, UniCompressModel) else model


def calls_of(model: PreTrainedModel) -> JanusCalls | Emu3Calls | GlmImageCalls:
    """The calls for a bare base, or for one with an adapter."""
    return CALLS[model.config.model_type]


def drawing_inputs(processor: ProcessorMixin, prompts: list[str], calls: JanusCalls | Emu3Calls | GlmImageCalls) -> dict:
    """The inputs of a batch of prompts to draw, prepared as in the base's documentation."""
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": prompt}]}], add_generation_prompt=True, tokenize=False
        )
        for prompt in prompts
    ]
    return calls.prompts(processor, texts)
