"""Seconds to draw at a realistic size, with random weights: a dense Janus and an adapter on it, in turn.

    python recipes/benchmark.py --hidden_size 1024 --layers 12          # about four minutes on two CPU cores
    python recipes/benchmark.py --hidden_size 2048 --layers 24 --vq_channels 128 --dtype bfloat16 --device cuda

Needs: pip install -c constraints.txt -e ".[recipes]". The second line has the shapes of Janus-Pro-1B and needs a GPU.
576 image tokens, stride 2, N_g 4. Seconds are end to end (language model, decompressor, image decoder), guidance 5, one
prompt, after a warm-up of each. Random weights say nothing of quality: that is `evaluate.py`'s.
"""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    logging,
    set_seed,
)
from trl import TrlParser

from uc_adapters import UniCompressConfig, UniCompressModel, get_uc_model

BOS, PAD, BOI, PROMPT_TOKENS = 1, 0, 2, 32


@dataclass
class BenchmarkArguments:
    """The size of the model, and where it runs."""

    hidden_size: int = field(default=1024, metadata={"help": "Of the language model. Janus-Pro-1B: 2048."})
    layers: int = field(default=12, metadata={"help": "Of the language model. Janus-Pro-1B: 24."})
    vq_channels: int = field(default=32, metadata={"help": "Base channels of the image decoder. Janus-Pro: 128."})
    decompressor: str = field(default="cell", metadata={"help": "See UniCompressConfig."})
    repeats: int = field(default=2, metadata={"help": "Timed drawings each; the least counts."})
    dtype: str = field(default="float32", metadata={"help": "Of the base."})
    device: str = field(default="cpu", metadata={"help": "Torch device."})


def random_janus(args: BenchmarkArguments) -> JanusForConditionalGeneration:
    """A Janus of Janus-Pro's proportions with 24 x 24 codes; its words and its vision tower are cut short."""
    width = args.hidden_size
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=width // 128,
        num_key_value_heads=width // 128,
        vocab_size=1024,
        max_position_embeddings=2048,
    )
    config = JanusConfig(
        text_config=text,
        vision_config=JanusVisionConfig(image_size=384, num_hidden_layers=1, projection_dim=width),
        vq_config=JanusVQVAEConfig(base_channels=args.vq_channels, projection_dim=width, image_token_embed_dim=width),
        image_token_id=3,
    )
    model = JanusForConditionalGeneration(config).to(args.device, getattr(torch, args.dtype)).eval()
    model.generation_config = GenerationConfig(bos_token_id=BOS, pad_token_id=PAD, generation_kwargs={"boi_token_id": BOI})
    return model


@torch.no_grad()
def seconds_to_draw(model: UniCompressModel, prompt: torch.Tensor, dense: bool) -> float:
    """One drawing by the base (`dense`) or by the adapter on it, to pixels."""
    with model.disable_adapter() if dense else nullcontext():
        start = time.perf_counter()
        mask = torch.ones_like(prompt)
        tokens = model.generate(prompt, attention_mask=mask, generation_mode="image", do_sample=True, guidance_scale=5)
        pixels = model.decode_image_tokens(tokens)
        if pixels.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def main(args: BenchmarkArguments) -> dict:
    logging.set_verbosity_error()  # stock drawing warns of defaults that do not matter here
    set_seed(0)
    model = get_uc_model(random_janus(args), UniCompressConfig(decompressor=args.decompressor)).eval()
    prompt = torch.randint(4, 1024, (1, PROMPT_TOKENS), device=args.device)
    prompt[0, 0], prompt[0, -1] = BOS, BOI
    seconds: dict[str, list[float]] = {"base": [], "adapter": []}
    for _ in tqdm(range(args.repeats + 1), desc="draw, in turn"):
        for name, taken in seconds.items():
            taken.append(seconds_to_draw(model, prompt, dense=name == "base"))
    least = {name: min(taken[1:]) for name, taken in seconds.items()}  # the first is the warm-up
    scores = {
        "seconds_per_image": least,
        "ratio": least["base"] / least["adapter"],
        "settings": vars(args),
        "torch": torch.__version__,
    }
    print(json.dumps(scores, indent=2))
    return scores


if __name__ == "__main__":
    main(*TrlParser(BenchmarkArguments).parse_args_and_config())
