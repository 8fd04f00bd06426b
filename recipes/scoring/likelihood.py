"""The NLL of images given their captions, under a dense base and under an adapter."""

from __future__ import annotations

import torch
from PIL import Image
from scoring.contenders import Contender, grid_of
from scoring.stock_calls import calls_of, drawing_inputs

from uc_adapters import UniCompressCollator, UniCompressModel
from uc_adapters.code_head import ExpansionHead
from uc_adapters.families import family_of


def image_nats(contender: Contender, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
    """The NLL of each image in nats, (B,): `dense_nats` for a bare base, `compact_nats` for an adapter."""
    measure = compact_nats if isinstance(contender.model, UniCompressModel) else dense_nats
    return measure(contender, images, prompts)


@torch.no_grad()
def dense_nats(contender: Contender, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
    """The NLL of each image's dense codes under a bare base, in nats, (B,)."""
    base, family, (rows, columns) = contender.model, family_of(contender.model), grid_of(contender)
    inputs = drawing_inputs(contender.processor, prompts, calls_of(base)).to(base.device)
    pixels = contender.processor.image_processor(images, return_tensors="pt")["pixel_values"].to(base.device)
    codes = family.dense_codes(pixels)  # (B, T)
    prompt = base.get_input_embeddings()(inputs["input_ids"])
    drawn = family.embed_codes(codes)  # (B, T, D)
    before_code = torch.ones(rows * columns, dtype=torch.bool)
    if family.has_eol:  # the EOL token after each row is given, and not scored
        eol = family.eol.expand(len(codes), rows, 1, -1)
        drawn = torch.cat([drawn.unflatten(1, (rows, columns)), eol], 2).flatten(1, 2)  # (B, H * (W + 1), D)
        before_code = (torch.arange(rows * (columns + 1)) + 1) % (columns + 1) != 0
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, drawn.shape[1] - 1), value=1)
    hidden = family.language_model(inputs_embeds=torch.cat([prompt, drawn[:, :-1]], 1), attention_mask=mask)
    before = hidden.last_hidden_state[:, prompt.shape[1] - 1 :][:, before_code]  # (B, T, D)
    logits = family.code_logits(before)  # (B, T, K)
    return _code_nats(logits, codes)


@torch.no_grad()
def compact_nats(contender: Contender, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
    """The NLL of each image's dense codes under an adapter, in nats, (B,).

    It is -log p(compact codes | text) - log p(dense codes | compact codes). `strip` samples the dense codes directly, so
    that this is their exact NLL.
    """
    model = contender.model
    collator = UniCompressCollator(contender.processor, model.active_peft_config, codes_per_step=contender.codes_per_step)
    collator = collator.without_chance()
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": prompt}]},
                {"role": "assistant", "content": [{"type": "image"}]},
            ],
            "images": [image],
        }
        for image, prompt in zip(images, prompts, strict=True)
    ]
    batch = {name: value.to(model.device) for name, value in collator(rows).items()}
    output = model(**batch)
    nats = -(output.log_probs * batch["gen_mask"][:, 1:]).sum(1)  # (B,)
    head = model.code_head
    if isinstance(head, ExpansionHead):
        codes = head.compress(batch["gen_pixel_values"])
        logits = head.dense_logits(codes)
        nats += _code_nats(logits, codes.dense)
    return nats


def _code_nats(logits: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The NLL of each row in nats, (B,), from logits (B, T, K) and codes (B, T)."""
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2).float(), codes, reduction="none").sum(1)
