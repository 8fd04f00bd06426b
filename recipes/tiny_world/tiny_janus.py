"""The tiny Janus: its configuration, tokenizer and processor. Every class is transformers' own."""

from __future__ import annotations

from tiny_world.digits import IMAGE_SIZE
from tiny_world.shapes import SHAPES, Shape
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

HEAD_DIM = 32
IMAGE_TOKENS = {
    "image_token": "<image_placeholder>",
    "boi_token": "<begin_of_image>",
    "eoi_token": "<end_of_image>",
}
CHAT_TEMPLATE = chat_template(IMAGE_TOKENS["image_token"])


def make_processor(
    num_image_tokens: int | None = None, words: list[str] = DIGITS_AND_WORDS, shape: Shape = SHAPES["tiny"]
) -> JanusProcessor:
    """A real JanusProcessor whose tokenizer knows `words` (default: those of the digit scenes).

    `num_image_tokens` is what an image takes in a prompt (default: dense tokens).
    """
    if num_image_tokens is None:
        num_image_tokens = (IMAGE_SIZE // shape.patch) ** 2
    tokenizer = word_tokenizer(IMAGE_TOKENS, words)
    image_processor = JanusImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return JanusProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE, num_image_tokens=num_image_tokens)


def make_model(processor: JanusProcessor, shape: Shape = SHAPES["tiny"]) -> JanusForConditionalGeneration:
    """A JanusForConditionalGeneration with random weights: of shape "tiny" about 3 M parameters, of "small" 19 M."""
    tokenizer = processor.tokenizer
    token_id = tokenizer.convert_tokens_to_ids
    text_config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // HEAD_DIM,
        num_key_value_heads=shape.width // HEAD_DIM,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision_config = JanusVisionConfig(
        hidden_size=shape.vision_width,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_width // HEAD_DIM,
        image_size=IMAGE_SIZE,
        patch_size=shape.patch,
        projection_dim=shape.width,
        num_image_tokens=(IMAGE_SIZE // shape.patch) ** 2,
    )
    vq_config = JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=shape.codes,
        latent_channels=64,
        base_channels=shape.vq_base,
        channel_multiplier=list(shape.vq_channels),
        num_res_blocks=shape.vq_blocks,
        projection_dim=shape.width,
        image_token_embed_dim=shape.width,
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
        guidance_scale=shape.guidance,
        generation_kwargs={"boi_token_id": token_id(IMAGE_TOKENS["boi_token"])},
    )
    return model
