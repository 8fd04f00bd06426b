"""A tiny GLM-Image: transformers' own classes, random weights. A picture of 64 x 64 pixels has 8 x 8 codes."""

from tiny_world.tiny_words import DIGITS_AND_WORDS, word_tokenizer
from transformers import (
    GenerationConfig,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageImageProcessorPil,
    GlmImageProcessor,
)

PATCH = 4  # the vision encoder sees 32 x 32 pixels of a picture of 64 x 64
CODES = 48
BEGIN, END = f"<|dit_token_{CODES}|>", f"<|dit_token_{CODES + 1}|>"
IMAGE_TOKENS = {"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"}
# As the published one: no roles, and the begin and the end of an image around its placeholder
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + f"{BEGIN}<|image|>{END}" + "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def make_processor() -> GlmImageProcessor:
    """The base's processor. Without other numbers it draws 256 x 256 pixels: a preview of 16 x 16 codes, and 8 x 8 codes."""
    codes = [f"<|dit_token_{code}|>" for code in range(CODES + 2)]
    tokenizer = word_tokenizer(IMAGE_TOKENS, DIGITS_AND_WORDS, first=codes, bos_token=BEGIN, eos_token=END)
    size = {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}
    image_processor = GlmImageImageProcessorPil(size=size, patch_size=PATCH, temporal_patch_size=1, merge_size=1)
    processor = GlmImageProcessor(image_processor, tokenizer, chat_template=TEMPLATE)
    processor.target_h = processor.target_w = 256
    return processor


def make_model(processor: GlmImageProcessor) -> GlmImageForConditionalGeneration:
    tokenizer = processor.tokenizer
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GlmImageConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "vision_vocab_size": CODES + 8,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            **special,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": PATCH,
            "image_size": 64,
        },
        vq_config={"embed_dim": 8, "num_embeddings": CODES, "latent_channels": 32},
        image_token_id=processor.image_token_id,
        image_start_token_id=tokenizer.bos_token_id,
        image_end_token_id=tokenizer.eos_token_id,
    )
    model = GlmImageForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**special)
    return model
