"""The tiny Janus: its configuration, tokenizer and processor. Every class is transformers' own."""

from __future__ import annotations

from tiny_world.digits import IMAGE_SIZE
from tiny_world.tiny_words import DIGITS_AND_WORDS, chat_template, word_tokenizer
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
)
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

WIDTH = 192
PATCH = 8
NUM_IMAGE_TOKENS = (IMAGE_SIZE // PATCH) ** 2
IMAGE_TOKENS = {
    "image_token": "<image_placeholder>",
    "boi_token": "<begin_of_image>",
    "eoi_token": "<end_of_image>",
}
CHAT_TEMPLATE = chat_template(IMAGE_TOKENS["image_token"])


def make_processor(num_image_tokens: int = NUM_IMAGE_TOKENS, words: list[str] = DIGITS_AND_WORDS) -> JanusProcessor:
    """A real JanusProcessor whose tokenizer knows `words` (default: those of the digit scenes)."""
    tokenizer = word_tokenizer(IMAGE_TOKENS, words)
    image_processor = JanusImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return JanusProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE, num_image_tokens=num_image_tokens)


def make_model(processor: JanusProcessor) -> JanusForConditionalGeneration:
    """A tiny JanusForConditionalGeneration (about 3 M parameters) with random weights."""
    tokenizer = processor.tokenizer
    token_id = tokenizer.convert_tokens_to_ids
    text_config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision_config = JanusVisionConfig(
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=WIDTH,
        num_image_tokens=NUM_IMAGE_TOKENS,
    )
    vq_config = JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=512,
        latent_channels=64,
        base_channels=32,
        channel_multiplier=[1, 1, 1, 2],
        num_res_blocks=0,
        projection_dim=WIDTH,
        image_token_embed_dim=WIDTH,
    )
    config = JanusConfig(
        text_config=text_config,
        vision_config=vision_config,
        vq_config=vq_config,
        image_token_id=token_id(IMAGE_TOKENS["image_token"]),
        tie_word_embeddings=False,
    )
    model = JanusForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        guidance_scale=2.0,
        generation_kwargs={"boi_token_id": token_id(IMAGE_TOKENS["boi_token"])},
    )
    return model
