"""Loads the dense base. Quantisation covers the language model alone: the rest is small and less forgiving."""

from __future__ import annotations

import torch
from finetuning.arguments import FinetuneArguments, TrainingConfig
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel

from uc_adapters.families import FAMILIES, make_loadable


def quantisation(base: str, bits: str) -> BitsAndBytesConfig:
    """The settings for transformers to load a base's language model in eight or four bits. Needs bitsandbytes.

    Args:
        base: Folder or Hub id.
        bits: "8bit" or "4bit".
    """
    config = AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        shapes = AutoModelForImageTextToText.from_config(config)
    language_model = FAMILIES[config.model_type].module_names["language model"] + "."
    linears = [name for name, module in shapes.named_modules() if isinstance(module, nn.Linear)]
    return BitsAndBytesConfig(
        load_in_8bit=bits == "8bit",
        load_in_4bit=bits == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=[name for name in linears if not name.startswith(language_model)],
    )


def load_base(args: FinetuneArguments, training: TrainingConfig) -> PreTrainedModel:
    """Loads the dense base. A quantised one is loaded onto the training device, where it stays."""
    make_loadable(AutoConfig.from_pretrained(args.base).model_type)
    options = {"dtype": args.dtype}
    if args.quantize is not None:
        options |= {"quantization_config": quantisation(args.base, args.quantize), "device_map": {"": training.device}}
    return AutoModelForImageTextToText.from_pretrained(args.base, **options)
