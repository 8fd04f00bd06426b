"""The models that are timed: a dense Janus and adapters on its weights, the shipped tiny pair or of Janus-Pro's shapes."""

from __future__ import annotations

from pathlib import Path

import torch
from scoring.contenders import twin_of
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
)

from uc_adapters import UniCompressConfig, UniCompressModel, get_uc_model

TEXT_TOKENS = 30  # tokens of a question or a prompt
CARDS = Path(__file__).parents[2] / "model_cards"
SHAPES = {  # the published language models: width, layers, heads, width of the MLP
    "janus-pro-1b": (2048, 24, 16, 5632),
    "janus-pro-7b": (4096, 30, 32, 11_008),
}


def janus_config(hidden: int, layers: int, heads: int, mlp: int) -> JanusConfig:
    """The config of a published Janus-Pro: SigLIP-L at 384 pixels, 24 x 24 codes of 16 384, untied token embeddings."""
    text_config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=mlp,
        vocab_size=102_400,
        max_position_embeddings=16_384,
        tie_word_embeddings=False,
    )
    return JanusConfig(
        text_config=text_config,
        vision_config=JanusVisionConfig(image_size=384, projection_dim=hidden),
        vq_config=JanusVQVAEConfig(projection_dim=hidden, image_token_embed_dim=hidden),
        image_token_id=3,
        tie_word_embeddings=False,
    )


def random_janus(config: JanusConfig, dtype: torch.dtype, device: str) -> JanusForConditionalGeneration:
    """A Janus with random weights."""
    with torch.device(device):
        model = JanusForConditionalGeneration._from_config(config, dtype=dtype)
    model.generation_config = GenerationConfig(bos_token_id=1, pad_token_id=0, generation_kwargs={"boi_token_id": 2})
    return model.eval()


def sides(shape: str, decompressor: str, also: list[str], dtype: torch.dtype, device: str) -> dict[str, nn.Module]:
    """Loads the bare base, and adapters on the same weights: "adapter", and one named after each entry of `also`.

    These are decompressors, or numbers of codes in a step of "strip".

    "tiny" is the shipped pair. The adapters of `also` have random weights, and so has everything of the other shapes.
    """

    def fresh(kind: str) -> UniCompressModel:
        fields = {"codes_per_step": int(kind)} if kind.isdigit() else {"decompressor": kind}
        return get_uc_model(twin_of(base), UniCompressConfig(**fields))

    if shape == "tiny":
        base = AutoModelForImageTextToText.from_pretrained(CARDS / "tiny-janus", dtype=dtype).to(device).eval()
        adapter = UniCompressModel.from_pretrained(twin_of(base), CARDS / "tiny-janus-uc4x")
    else:
        base = random_janus(janus_config(*SHAPES[shape]), dtype, device)
        adapter = fresh(decompressor)
    adapters = {"adapter": adapter} | {kind: fresh(kind) for kind in also}
    return {"base": base} | {name: model.eval() for name, model in adapters.items()}


def fused(adapter: UniCompressModel) -> UniCompressModel:
    """A twin of an adapter with its LoRA merged; it shares all other weights with the original."""
    model = twin_of(adapter)
    model.merge_adapter()
    return model


def prompts(model: nn.Module, batch: int, placeholders: int = 0) -> dict[str, torch.Tensor]:
    """Random text tokens after BOS: to read, with an image's placeholders before them; to draw, with BOI as the last."""
    config = model.generation_config
    ids = torch.randint(6, 50, (batch, TEXT_TOKENS), device=model.device)  # neither placeholders nor BOI
    ids[:, 0] = config.bos_token_id
    if placeholders:
        image = torch.full((batch, placeholders), model.config.image_token_id, device=model.device)
        ids = torch.cat([ids[:, :1], image, ids[:, 1:]], 1)
    else:
        ids[:, -1] = config.generation_kwargs["boi_token_id"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def random_pixels(base: nn.Module, batch: int) -> torch.Tensor:
    """Random images of the base's size, (B, 3, H, W)."""
    size = base.config.vision_config.image_size
    return torch.randn(batch, 3, size, size, device=base.device, dtype=base.dtype)
