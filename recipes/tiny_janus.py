"""The tiny Janus: its configuration, tokenizer and processor. Every class is transformers' own."""

from __future__ import annotations

import re

from digits import COLOURS, DESCRIBE, IMAGE_SIZE, PLACES
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

WIDTH = 192
PATCH = 8
NUM_IMAGE_TOKENS = (IMAGE_SIZE // PATCH) ** 2
SPECIAL_TOKENS = {
    "pad_token": "<pad>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
}
IMAGE_TOKENS = {
    "image_token": "<image_placeholder>",
    "boi_token": "<begin_of_image>",
    "eoi_token": "<end_of_image>",
}
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|User|>: ' if message['role'] == 'user' else '<|Assistant|>: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image_placeholder>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '\n\n' }}{% else %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>:{% endif %}"
)


def make_processor(num_image_tokens: int = NUM_IMAGE_TOKENS) -> JanusProcessor:
    """A real JanusProcessor whose tokenizer knows the tiny world's words."""
    sentences = [*COLOURS, *PLACES, DESCRIBE, "a and at the ?.:!,"]
    sentences += ["What digit is at the", "What colour is the", "How many digits are there", "Draw an image of"]
    words = {word for sentence in sentences for word in re.findall(r"\w+|[^\w\s]", sentence.lower())}
    special = [*SPECIAL_TOKENS.values(), *IMAGE_TOKENS.values(), "<|User|>", "<|Assistant|>"]
    vocabulary = [*special, *(str(digit) for digit in range(10)), *sorted(words)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **SPECIAL_TOKENS,
        extra_special_tokens=IMAGE_TOKENS,
        padding_side="left",
        model_max_length=1024,
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|User|>", "<|Assistant|>"]}, replace_extra_special_tokens=False
    )
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
