"""What several test files share: prompts, and adapters whose every weight is random, so that each of them shows."""

import numpy as np
import torch
from PIL import Image
from transformers import LogitsProcessor

from uc_adapters import UniCompressConfig, UniCompressModel, get_uc_model
from uc_adapters.config import DECOMPRESSORS

__all__ = ["DECOMPRESSORS", "DENSE", "SHORT"]

ANN = "hf_ann"  # the token of the loopback Hub's user

DENSE = 64  # image tokens of the tiny base: 8 x 8
SHORT = 4 + 1 + 16  # of an adapter at stride 2 with four global tokens, to read
DRAWN = 1 + 16  # to draw: "strip" draws no global tokens
CAPTIONS = ["a red 3 at the top left", "a blue 7 at the bottom right and a green 1 at the top right", "a cyan 9"]
IMAGE = "<image_placeholder>"


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def small_config(**fields) -> UniCompressConfig:
    """A config of a small adapter."""
    return UniCompressConfig(**{"r": 2, "decompressor_width": 64, "decompressor_layers": 1, **fields})


def randomise(model: torch.nn.Module, adapter_name: str = "default", seed: int = 0) -> None:
    """Fills every weight of one adapter: LoRA's B and others start at zero and would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and f".{adapter_name}." in name:
                parameter.normal_(std=0.1, generator=generator)


def attach(base, adapter_name: str = "default", seed: int = 0, **fields) -> UniCompressModel:
    """A base with a small adapter of random weights, in eval mode."""
    model = get_uc_model(base, small_config(**fields), adapter_name).eval()
    randomise(model, adapter_name, seed)
    return model


def chat(processor, *content) -> str:
    """The text of a user turn; images are where `IMAGE` stands."""
    parts = [{"type": "image"} if part == IMAGE else {"type": "text", "text": part} for part in content]
    return processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False)


def question_inputs(processor, questions: list[str], images: list[Image.Image], **kwargs):
    """A batch of questions, each about its image."""
    texts = [chat(processor, IMAGE, question) for question in questions]
    return processor(text=texts, images=images, padding=True, return_tensors="pt", **kwargs)


def drawing_inputs(processor, prompts: list[str], **kwargs):
    """A batch of prompts to draw."""
    texts = [chat(processor, prompt) for prompt in prompts]
    return processor(text=texts, padding=True, return_tensors="pt", generation_mode="image", **kwargs)


class Record(LogitsProcessor):
    """Keeps the codes that greedy decoding chooses, and their log-probabilities."""

    def __init__(self):
        self.log_probs, self.codes = [], []

    def __call__(self, input_ids, scores):
        self.codes.append(scores.argmax(-1))
        self.log_probs.append(scores.log_softmax(-1).amax(-1))
        return scores


def answer(model, inputs, count: int = 6) -> torch.Tensor:
    """`count` greedy tokens behind the prompt, (B, count)."""
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=count, min_new_tokens=count)
    return tokens[:, -count:]


def draw(model, inputs, **kwargs) -> torch.Tensor:
    """Drawn dense tokens."""
    return model.generate(**inputs, generation_mode="image", **kwargs)


def logits(model, inputs) -> torch.Tensor:
    """Logits of one forward."""
    with torch.no_grad():
        return model(**inputs).logits


def lora_weights(model, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """Copies of one adapter's weights."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "lora_" in name and f".{adapter_name}." in name
    }


def base_weights(model) -> dict[str, torch.Tensor]:
    """Copies of the base's weights, under their names in the plain base."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "lora_" not in name
    }


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Two sets of tensors are equal bit for bit."""
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
