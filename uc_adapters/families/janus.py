"""Janus and Janus-Pro: they read SigLIP features, and draw codes of a VQ tokenizer with a generation head."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import BatchFeature, GenerationConfig, ProcessorMixin
from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

from ..errors import InputError
from ..layers import Grid, unit
from .family import Family, Geometry, exact, weight_of


class Janus(Family):
    """The family of `JanusForConditionalGeneration`."""

    model_type = "janus"
    model_class = "JanusForConditionalGeneration"
    processor_class = "JanusProcessor"
    module_names = {
        "language model": "model.language_model",
        "tokenizer": "model.vqmodel",
        "read": "model.aligner",  # SigLIP features (B, T, read_width) -> (B, T, D)
        "draw": "model.generation_head",  # hidden state (..., D) -> logits of the codes (..., K)
    }
    default_guidance = 5.0
    drawing_snippet = """\
inputs = processor(text=prompt, generation_mode="image", return_tensors="pt").to(device)
tokens = model.generate(**inputs, generation_mode="image", do_sample=True)
pixels = model.decode_image_tokens(tokens).float().cpu().permute(0, 3, 1, 2)
pixels = processor.postprocess(list(pixels), return_tensors="pt")["pixel_values"][0]  # (3, H, W), from 0 to 255
image = Image.fromarray(pixels.permute(1, 2, 0).numpy())"""

    def __init__(self, base: nn.Module):
        self.base = base
        config = base.config
        self.image_token_id = config.image_token_id
        self.geometry = Geometry(
            model_type=self.model_type,
            hidden_size=config.text_config.hidden_size,
            num_layers=config.text_config.num_hidden_layers,
            num_heads=config.text_config.num_attention_heads,
            intermediate_size=config.text_config.intermediate_size,
            image_size=config.vision_config.image_size,
            read_layers=config.vision_config.num_hidden_layers,
            read_width=config.vision_config.hidden_size,
            read_side=config.vision_config.image_size // config.vision_config.patch_size,
            draw_side=config.vq_config.num_patches,
            num_codes=config.vq_config.num_embeddings,
            code_width=config.vq_config.embed_dim,
        )

    @staticmethod
    def prompt_text(processor: ProcessorMixin, text: str, to_draw: bool) -> str:
        """Adds the default system prompt to questions, if the processor uses one, and not to prompts to draw."""
        return text if to_draw or not processor.use_default_system_prompt else DEFAULT_SYSTEM_PROMPT + text

    def read_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        vision = self.base.model.vision_model
        return vision(pixel_values.to(vision.dtype), return_dict=True).last_hidden_state

    @property
    def codebook(self) -> torch.Tensor:
        return self.code_space(weight_of(self.base.model.vqmodel.quantize.embedding).detach().float())

    @exact
    @torch.no_grad()
    def latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        vqmodel = self.base.model.vqmodel
        latents = vqmodel.quant_conv(vqmodel.encoder(pixel_values.to(vqmodel.dtype)))  # (B, C, H, W)
        return self.code_space(latents.flatten(2).transpose(1, 2).float())

    def code_space(self, x: torch.Tensor) -> torch.Tensor:
        return unit(x)  # Janus compares by cosine similarity

    def embed_codes(self, codes: torch.Tensor) -> torch.Tensor:
        embeddings = self.base.prepare_embeddings_for_image_generation(codes.flatten()[None])  # quantised layers take no more
        return embeddings[0].unflatten(0, codes.shape)

    def code_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        head = self.base.model.generation_head
        head = head.get_base_layer() if hasattr(head, "get_base_layer") else head
        dtype = head.proj_out.weight.dtype
        return head(hidden.to(dtype if dtype.is_floating_point else self.base.dtype))  # quantised weights are whole numbers

    def language_model(self, **inputs):
        return self.base.model.language_model(**inputs)

    def prompt_inputs(
        self, processor: ProcessorMixin, texts: list[str], height: int | None = None, width: int | None = None
    ) -> BatchFeature:
        side = self.geometry.image_size
        if height not in (None, side) or width not in (None, side):
            raise InputError(
                f"height={height}, width={width}; expected {side} for both, or nothing: this base draws images of one size."
            )
        return processor(text=texts, padding=True, return_tensors="pt", generation_mode="image")

    def wrapper_mask(self, input_ids: torch.Tensor, generation_config: GenerationConfig) -> torch.Tensor:
        return (input_ids == generation_config.bos_token_id) | (input_ids == self.boi_token_id(generation_config))

    def boi_token_id(self, generation_config: GenerationConfig) -> int:
        return generation_config.generation_kwargs["boi_token_id"]

    def to_pixels(self, tokens: torch.Tensor, grid: Grid) -> torch.Tensor:
        return self.base.decode_image_tokens(tokens).permute(0, 3, 1, 2)

    def compact_processor(self, processor: ProcessorMixin, stride: int, num_global_tokens: int) -> ProcessorMixin:
        processor = copy.deepcopy(processor)
        processor.num_image_tokens = num_global_tokens + 1 + self.geometry.read_side**2 // stride**2
        return processor
