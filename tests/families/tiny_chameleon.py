"""A tiny Chameleon: transformers' own classes, random weights."""

from tiny_world.tiny_words import DIGITS_AND_WORDS, chat_template, word_tokenizer
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonImageProcessorPil,
    ChameleonProcessor,
    ChameleonVQVAEConfig,
    GenerationConfig,
)

SIZE = 64
CODES = 48
IMAGE_TOKENS = {"image_token": "<image>", "boi_token": "<racm3:break>", "eoi_token": "<eoss>", "sep_token": "<sep>"}


def code_word(code: int) -> str:
    """Chameleon writes a code's digits as letters."""
    return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"


def make_processor() -> ChameleonProcessor:
    tokenizer = word_tokenizer(IMAGE_TOKENS, [*DIGITS_AND_WORDS, *map(code_word, range(CODES))])
    image_processor = ChameleonImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    processor = ChameleonProcessor(image_processor, tokenizer, image_seq_length=64)
    processor.chat_template = chat_template(IMAGE_TOKENS["image_token"])  # its class saves none: a user gives it one
    return processor


def make_model(processor: ChameleonProcessor) -> ChameleonForConditionalGeneration:
    tokenizer = processor.tokenizer
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = ChameleonConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        vocabulary_map=tokenizer.get_vocab(),
        vq_config=ChameleonVQVAEConfig(
            embed_dim=8,
            num_embeddings=CODES,
            latent_channels=8,
            resolution=SIZE,
            base_channels=32,
            channel_multiplier=[1, 1, 1, 2],
            num_res_blocks=1,
        ),
        **special,
    )
    model = ChameleonForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**special)
    return model
