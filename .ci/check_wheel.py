"""Draws, saves and loads with the installed wheel, far from the checkout: python check_wheel.py BASE."""

import sys

import torch
from transformers import AutoModelForImageTextToText

from uc_adapters import UniCompressConfig, UniCompressModel, get_uc_model

base = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
model = get_uc_model(base, UniCompressConfig(decompressor_width=32)).eval()
begin = base.generation_config.generation_kwargs["boi_token_id"]
tokens = model.generate(torch.tensor([[base.generation_config.bos_token_id, 20, begin]]), generation_mode="image")
assert tokens.shape == (1, model.family.geometry.draw_side**2), tokens.shape
model.save_pretrained("adapter")
assert UniCompressModel.from_pretrained("adapter").num_image_tokens == model.num_image_tokens
print(f"the wheel draws: {tuple(tokens.shape)}")
