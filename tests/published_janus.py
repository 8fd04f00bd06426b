"""A thin Janus-Pro as published: token ids, template, system prompt, 384 pixels, 576 tokens, 16,384 codes; random weights.

Facts are those of transformers' conversion of Janus-Pro-1B. Only what costs time is thin: widths and depths.
"""

from pathlib import Path

import torch
from templates import template
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
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

SIZE = 102_400
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"  # noqa: RUF001  (as published)
IMAGE = "<image_placeholder>"
SPECIAL = {
    BOS: 100_000,
    EOS: 100_001,
    PAD: 100_002,
    "<begin_of_image>": 100_016,
    IMAGE: 100_581,
    "<end_of_image>": 100_593,
    "<|User|>": 100_601,
    "<|Assistant|>": 100_602,
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges, so that every byte is a token, which puts the begin of the sequence in front."""
    taken = set(SPECIAL.values())
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {f"<unused{index}>": index for index in range(len(vocabulary), SIZE) if index not in taken}
    backend = Tokenizer(models.BPE(vocab=vocabulary | SPECIAL, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, SPECIAL[BOS])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE, "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"},
        model_max_length=16_384,
        padding_side="left",
    )
    roles = {"additional_special_tokens": ["<|User|>", "<|Assistant|>"]}
    tokenizer.add_special_tokens(roles, replace_extra_special_tokens=False)
    return tokenizer


def make_processor() -> JanusProcessor:
    image_processor = JanusImageProcessorPil(
        size={"height": 384, "width": 384}, image_mean=[0.5] * 3, image_std=[0.5] * 3, min_size=14
    )
    return JanusProcessor(
        image_processor,
        make_tokenizer(),
        chat_template=template("janus", IMAGE),
        use_default_system_prompt=True,
        num_image_tokens=576,
    )


def make_model(width: int = 64) -> JanusForConditionalGeneration:
    special = {"bos_token_id": SPECIAL[BOS], "eos_token_id": SPECIAL[EOS], "pad_token_id": SPECIAL[PAD]}
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=SIZE,
        max_position_embeddings=16_384,
        tie_word_embeddings=False,
        **special,
    )
    vision = JanusVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=384, patch_size=16, projection_dim=width
    )
    codes = JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=16_384,
        latent_channels=32,
        base_channels=32,
        channel_multiplier=[1, 1, 1, 1, 1],
        num_res_blocks=0,
        projection_dim=width,
        image_token_embed_dim=width,
        num_patches=24,
    )
    config = JanusConfig(
        text_config=text, vision_config=vision, vq_config=codes, image_token_id=SPECIAL[IMAGE], tie_word_embeddings=False
    )
    model = JanusForConditionalGeneration(config)
    boi = {"boi_token_id": SPECIAL["<begin_of_image>"]}
    model.generation_config = GenerationConfig(guidance_scale=5, generation_kwargs=boi, **special)
    return model


def write(folder: Path) -> Path:
    """The base as a repo folder."""
    torch.manual_seed(0)
    make_model().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder
