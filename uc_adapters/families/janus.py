"""Janus and Janus-Pro in transformers: SigLIP features are read, codes of a VQ tokenizer are drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..errors import InputError
from ..layers import nearest_codes, unit


@dataclass(frozen=True)
class Geometry:
    """The shapes of a base that an adapter depends on; recorded in its config and compared on loading."""

    model_type: str
    hidden_size: int  # D, width of the language model
    num_layers: int
    num_heads: int
    intermediate_size: int
    image_size: int  # pixels, square
    read_layers: int  # of the vision tower
    read_width: int  # width of the features that are read
    read_side: int  # side of their grid
    draw_side: int  # side of the grid of codes
    num_codes: int  # K
    code_width: int  # C


class Janus:
    """What the method needs to know of a `JanusForConditionalGeneration`."""

    model_class = "JanusForConditionalGeneration"
    roles = {
        "read": "model.aligner",  # SigLIP features (B, T, read_width) -> (B, T, D)
        "draw": "model.generation_head",  # hidden state (..., D) -> logits of the codes (..., K)
        "language model": "model.language_model",
        "codes to pixels": "model.vqmodel",
    }
    target_modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __init__(self, base: nn.Module):
        self.base = base
        config = base.config
        self.image_token_id: int = config.image_token_id
        self.geometry = Geometry(
            model_type=config.model_type,
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

    @property
    def codebook(self) -> torch.Tensor:
        """The base's code entries on the unit sphere, (K, C), float32."""
        return unit(self.base.model.vqmodel.quantize.embedding.weight.detach().float())

    @torch.no_grad()
    def latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, S, S) -> unit-norm latents before quantisation, (B, T, C), float32."""
        vqmodel = self.base.model.vqmodel
        latents = vqmodel.quant_conv(vqmodel.encoder(pixel_values.to(vqmodel.dtype)))  # (B, C, H, W)
        return unit(latents.flatten(2).transpose(1, 2).float())

    def dense_codes(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, S, S) -> the codes that the base itself would draw, (B, T)."""
        return nearest_codes(self.latents(pixel_values), self.codebook)

    def read_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, S, S) -> dense features before the aligner, (B, T, read_width)."""
        vision = self.base.model.vision_model
        return vision(pixel_values.to(vision.dtype), return_dict=True).last_hidden_state

    def embed_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (...) -> inputs of the language model, (..., D)."""
        return self.base.prepare_embeddings_for_image_generation(codes)

    def code_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., D) -> logits of the codes (..., K): the base's own head, below any adapter's host."""
        head = self.base.model.generation_head
        head = head.get_base_layer() if hasattr(head, "get_base_layer") else head
        return head(hidden.to(head.proj_out.weight.dtype))

    def text_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., D) -> logits of the words."""
        return self.base.lm_head(hidden)

    def language_model(self, **inputs):
        """Runs the language model on `inputs_embeds`."""
        return self.base.model.language_model(**inputs)

    def embed_prompt(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None, read_mask: torch.Tensor) -> torch.Tensor:
        """Word embeddings (B, L, D) with the images to read at the placeholders of `read_mask` (B, L)."""
        embeddings = self.base.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return embeddings
        images = self.base.model.get_image_features(pixel_values, return_dict=True).pooler_output  # (N, P, D)
        return embeddings.masked_scatter(read_mask.unsqueeze(-1), images.to(embeddings.dtype))

    def unconditional(self, input_ids: torch.Tensor, generation_config) -> torch.Tensor:
        """The prompt of classifier-free guidance: every token but the sequence's and the image's begin is padding."""
        kept = (input_ids == generation_config.bos_token_id) | (
            input_ids == generation_config.generation_kwargs["boi_token_id"]
        )
        return input_ids.masked_fill(~kept, generation_config.pad_token_id)

    def check_pixels(self, pixel_values: torch.Tensor) -> None:
        """Raises InputError unless pixels are (N, 3, S, S) with N >= 1 and the base's own S."""
        size = self.geometry.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, size, size) or len(pixel_values) == 0:
            raise InputError(
                f"pixel_values of shape {tuple(pixel_values.shape)}; expected (images, 3, {size}, {size}) with at least "
                "one image. Let the base's processor resize RGB images: processor(text=..., images=...)."
            )
