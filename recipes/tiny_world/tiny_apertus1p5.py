"""The tiny Apertus 1.5: its configuration, tokenizer and processor. Every class is transformers' own, of 5.24 or later.

It only reads. Codes are input tokens behind the text vocabulary, which the head does not score. The published model also
hears, so the tiny one has an audio tokenizer, with random weights.
"""

from __future__ import annotations

from tiny_world.tiny_words import DIGITS_AND_WORDS, chat_template, word_tokenizer
from transformers import (
    Apertus1p5Config,
    Apertus1p5ForConditionalGeneration,
    Apertus1p5Processor,
    Apertus1p5TextConfig,
    Apertus1p5VisionTokenizerConfig,
    Emu3ImageProcessor,
    GenerationConfig,
    WavTokenizerEncoderConfig,
    WavTokenizerFeatureExtractor,
)
from transformers.utils import is_torchvision_available

WIDTH = 128
CODES, FACTOR = 512, 8  # the published model has 131,072 codes of 16 x 16 pixels
AUDIO_CODES = 16
IMAGE_TOKENS = {
    "image_token": "<|image|>",
    "boi_token": "<|img_start|>",
    "eoi_token": "<|img_end|>",
    "image_wrapper_token": "<|img_token_start|>",
    "eol_token": "<|img_end_of_row|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio_start|>",
    "eoa_token": "<|audio_end|>",
}


def make_processor(
    min_pixels: int = 64 * 64, max_pixels: int = 64 * 64, words: list[str] = DIGITS_AND_WORDS
) -> Apertus1p5Processor:
    """A real Apertus1p5Processor whose tokenizer knows `words` (default: those of the digit scenes)."""
    tokenizer = word_tokenizer(IMAGE_TOKENS, [*words, "*"])
    return Apertus1p5Processor(
        make_image_processor(min_pixels, max_pixels),
        WavTokenizerFeatureExtractor(hop_length=4),
        tokenizer,
        chat_template=chat_template(IMAGE_TOKENS["image_token"]),
    )


def make_image_processor(min_pixels: int, max_pixels: int):
    """Apertus 1.5's own image processor, or without torchvision Emu3's, which resizes and normalises by the same rule."""
    if is_torchvision_available():
        from transformers import Apertus1p5ImageProcessor

        size = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        return Apertus1p5ImageProcessor(size=size, spatial_factor=FACTOR)
    mean_and_std = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return Emu3ImageProcessor(**mean_and_std, min_pixels=min_pixels, max_pixels=max_pixels, spatial_factor=FACTOR)


def make_model(processor: Apertus1p5Processor) -> Apertus1p5ForConditionalGeneration:
    """A tiny Apertus1p5ForConditionalGeneration (about 0.8 M parameters) with random weights."""
    tokenizer = processor.tokenizer
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = len(tokenizer)
    config = Apertus1p5Config(
        text_config=Apertus1p5TextConfig(
            hidden_size=WIDTH,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=text + CODES + AUDIO_CODES,
            output_vocab_size=text,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
            **special,
        ),
        vision_config=Apertus1p5VisionTokenizerConfig(
            codebook_size=CODES,
            embed_dim=8,
            latent_channels=8,
            base_channels=32,
            channel_multiplier=[1, 1, 1, 2],
            num_res_blocks=1,
            attn_resolutions=[],
        ),
        audio_config=WavTokenizerEncoderConfig(
            num_filters=4,
            upsampling_ratios=[2, 2],
            num_lstm_layers=1,
            hidden_size=8,
            codebook_dim=8,
            codebook_size=AUDIO_CODES,
        ),
        image_token_id=processor.image_token_id,
        audio_token_id=processor.audio_token_id,
        image_token_offset=text,
        audio_token_offset=text + CODES,
    )
    model = Apertus1p5ForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**special)
    return model
