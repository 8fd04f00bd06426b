"""The tiny Emu3: its configuration, tokenizer and processor. Every class is transformers' own.

Emu3 differs from Janus in all that matters here. It has no vision tower: one VQ tokenizer serves both reading and drawing.
Codes are tokens of the vocabulary, an EOL token follows each row of codes, and the size of an image is text before it.
"""

from __future__ import annotations

from tiny_world.tiny_words import DIGITS_AND_WORDS, chat_template, word_tokenizer
from transformers import (
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3ImageProcessor,
    Emu3Processor,
    Emu3TextConfig,
    Emu3VQVAEConfig,
    GenerationConfig,
)

WIDTH = 192
CODES = 512
IMAGE_TOKENS = {
    "image_token": "<image>",
    "boi_token": "<|image start|>",
    "eoi_token": "<|image end|>",
    "image_wrapper_token": "<|image token|>",
    "eof_token": "<|extra_201|>",
    "eol_token": "<|extra_200|>",
}
CHAT_TEMPLATE = chat_template(IMAGE_TOKENS["image_token"], begin="")  # the processor adds <bos> itself


def make_processor(min_pixels: int = 64 * 64, max_pixels: int = 64 * 64, words: list[str] = DIGITS_AND_WORDS) -> Emu3Processor:
    """A real Emu3Processor whose tokenizer knows `words` (default: those of the digit scenes) and a token for each code."""
    codes = [f"<|visual token {code:06d}|>" for code in range(CODES)]
    tokenizer = word_tokenizer(IMAGE_TOKENS, [*words, "*", *codes])
    image_processor = Emu3ImageProcessor(
        image_mean=[0.5] * 3, image_std=[0.5] * 3, min_pixels=min_pixels, max_pixels=max_pixels
    )
    return Emu3Processor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)


def make_model(processor: Emu3Processor, temporal_downsample_factor: int = 1) -> Emu3ForConditionalGeneration:
    """A tiny Emu3ForConditionalGeneration (about 2.5 M parameters) with random weights.

    The published model encodes an image as a video of four equal frames (`temporal_downsample_factor=4`); one is enough here.
    """
    tokenizer = processor.tokenizer
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text_config = Emu3TextConfig(
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        attention_dropout=0.0,
        **{f"{name}_token_id": token_id for name, token_id in special.items()},
    )
    vq_config = Emu3VQVAEConfig(
        codebook_size=CODES,
        embed_dim=8,
        latent_channels=8,
        base_channels=32,
        channel_multiplier=[1, 1, 1, 2],
        num_res_blocks=1,
        attn_resolutions=[],
        hidden_size=64,
        temporal_downsample_factor=temporal_downsample_factor,
    )
    config = Emu3Config(text_config=text_config, vq_config=vq_config, vocabulary_map=tokenizer.get_vocab())
    model = Emu3ForConditionalGeneration(config)
    # No guidance_scale here, because transformers' generate would guide answers with it, too
    model.generation_config = GenerationConfig(**{f"{name}_token_id": token_id for name, token_id in special.items()})
    return model
