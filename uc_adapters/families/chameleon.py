"""Chameleon: image codes share the vocabulary with text, and images have one size. In transformers it cannot draw."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import ProcessorMixin

from .family import Geometry, exact
from .shared_vocabulary import SharedVocabularyFamily


class Chameleon(SharedVocabularyFamily):
    """The family of `ChameleonForConditionalGeneration`."""

    model_type = "chameleon"
    model_class = "ChameleonForConditionalGeneration"
    processor_class = "ChameleonProcessor"
    module_names = {
        "language model": "model.layers",  # embeddings and VQ tokenizer are outside of it
        "tokenizer": "model.vqmodel",
        "read": "model.vqmodel.encoder",
    }
    question_snippet = 'prompt = "Describe the image.<image>"'
    why_no_drawing = "transformers' Chameleon has no decoder from codes to pixels and masks the codes in its logits"

    @staticmethod
    def prompt_text(processor: ProcessorMixin, text: str, to_draw: bool) -> str:
        return text + processor.tokenizer.sep_token

    def __init__(self, base: nn.Module):
        self.base = base
        config = base.config
        self.image_token_id = base.model.vocabulary_mapping.image_token_id
        vq = config.vq_config
        side = vq.resolution // 2 ** (len(vq.channel_multiplier) - 1)
        self.geometry = Geometry(
            model_type=self.model_type,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            image_size=vq.resolution,
            read_layers=None,
            read_width=config.hidden_size,
            read_side=side,
            draw_side=side,
            num_codes=vq.num_embeddings,
            code_width=vq.embed_dim,
        )

    @exact
    @torch.no_grad()
    def latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        vqmodel = self.base.model.vqmodel
        latents = vqmodel.quant_conv(vqmodel.encoder(pixel_values.to(vqmodel.dtype)))  # (B, C, H, W)
        return latents.flatten(2).transpose(1, 2).float()

    def encoded_codes(self, encoded, input_ids: torch.Tensor | None, stride: int) -> list[torch.Tensor]:
        side = self.geometry.read_side
        return list(encoded.image_tokens.view(-1, side, side))

    def language_model(self, **inputs):
        return self.base.model(**inputs)

    def text_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the logits of the text tokens from hidden states (..., D). Logits of codes are masked, as in the base."""
        logits = self.base.lm_head(hidden)
        return logits.index_fill(-1, self.code_token_ids, torch.finfo(logits.dtype).min)

    def compact_processor(self, processor: ProcessorMixin, stride: int, num_global_tokens: int) -> ProcessorMixin:
        processor = copy.deepcopy(processor)
        processor.image_seq_length = num_global_tokens + 1 + self.geometry.read_side**2 // stride**2
        return processor
