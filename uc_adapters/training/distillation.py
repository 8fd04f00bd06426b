"""The dense base as a teacher (`finetune.py --distill`).

The teacher is the base itself: the adapter is disabled, and the inputs are built again with the base's number of placeholders.
It sees the prompts that inference would show it. It can also fill in what a dataset lacks, answers to questions and drawings of
prompts (`filled_in` of the recipes).

The dataset's own answers are learned unchanged, since the base might not give them. If an answer is the base's own, its text
tokens are learned from the base's distribution, KL(teacher || student). With "strip", the codes are learned from the teacher's
distribution, and the hidden states from the teacher's hidden states (`StripHead.divergence`). The weight of this term falls
linearly from 1 at the first step to 0 at the last. The labels of the codes have the rest.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin
from trl import SFTConfig

from ..data import UniCompressCollator
from ..families import Family
from ..images import Images
from ..layers import Grid, nearest_codes
from ..model import UniCompressModel
from ..positions import dense_deltas, dense_reading, sequence_positions
from .joint import JointTrainer, NamingCollator


def teacher_collator(collator: UniCompressCollator, processor: ProcessorMixin) -> UniCompressCollator:
    """Returns a collator that makes the dense base's batches from the rows of `collator`. `processor` is the base's own.

    Both drop the same captions if `collator.epoch` is set, as `DistillationTrainer` does.
    """
    dense_form = {"stride": 1, "num_global_tokens": 0, "codes_per_step": None, "drawing_global_tokens": False}
    dense = replace(collator, processor=processor, config=replace(collator.config, **dense_form), codes_per_step=None)
    dense.chance = collator.chance  # so that the same rows lose their captions
    return dense


class TeacherCollator(NamingCollator):
    """Adds the teacher's inputs to a batch, under `teacher`: the same rows, in the dense form of the base.

    `teacher` also has `taught`, (B,): whether the answers of a sequence are the teacher's own.

    Args:
        collator: The adapter's collator.
        processor: The base's own processor, which writes the base's number of placeholders.
    """

    def __init__(self, collator: UniCompressCollator, processor: ProcessorMixin):
        super().__init__(collator)
        self.dense = teacher_collator(collator, processor)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        dense, indices = self.dense.with_rows(rows)
        dense["taught"] = torch.tensor([bool(rows[row].get("taught")) for row in indices])
        return super().__call__(rows) | {"teacher": dense}


class DistillationTrainer(JointTrainer):
    """A `JointTrainer` with the dense base as a teacher, for answers that are the base's own, and for codes with "strip".

    Args:
        model: The base with an adapter.
        args: TRL's training arguments.
        teacher_processor: The base's own processor.
        data_collator: The adapter's collator.
        **kwargs: Passed to `JointTrainer`.
    """

    def __init__(
        self,
        model: UniCompressModel,
        args: SFTConfig,
        *,
        teacher_processor: ProcessorMixin,
        data_collator: UniCompressCollator,
        **kwargs: Any,
    ):
        super().__init__(model, args, data_collator=data_collator, **kwargs)
        self.data_collator = TeacherCollator(data_collator, teacher_processor)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "teacher" in inputs:  # batches for evaluation have no teacher
            # The teacher gives its own quality fastest, and the codes themselves lead beyond it, so its weight falls
            weight = 1 - self.state.global_step / max(self.state.max_steps, 1)
            inputs |= teacher_targets(self.model, inputs.pop("teacher"), weight)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


@torch.no_grad()
def teacher_targets(model: UniCompressModel, batch: dict[str, torch.Tensor], weight: float) -> dict[str, torch.Tensor | float]:
    """Runs the dense base on a batch of its own inputs; returns the teacher's arguments of `UniCompressModel.forward`.

    Args:
        model: The adapter's model. The adapter is disabled meanwhile.
        batch: The teacher's batch, from `TeacherCollator`.
        weight: The weight of the teacher's hidden states, from 0 to 1.

    Returns:
        If some answers are the base's own: `teacher_probs`, its probabilities at the N labelled text tokens, (N, vocabulary),
        and `teacher_probs_weight`, (N,), 1 in those answers and 0 elsewhere. If the batch has images to draw with "strip":
        `teacher_states`, its last hidden states before each dense code, (M, T, D), and `teacher_states_weight`, the weight.
    """
    family = model.family
    gen_mask = batch.get("gen_mask", torch.zeros_like(batch["input_ids"], dtype=torch.bool))
    text = ((batch["labels"] != -100) & ~gen_mask)[:, 1:]  # (B, L - 1)
    share = batch["taught"].unsqueeze(1).expand_as(text)[text].float()  # (N,)
    drawn = Images(*(batch.get(f"gen_{name}") for name in ("pixel_values", "image_sizes", "latents")))
    teaches_codes = drawn.values is not None and model.active_peft_config.decompressor == "strip"
    if not teaches_codes and not share.any():
        return {}
    codes, grids = dense_codes(family, drawn), [family.draw_grid(size) for size in drawn.sizes(family)]
    with model.disable_adapter():
        hidden = _dense_hidden(model, batch, gen_mask, codes, grids)[:, :-1]  # (B, L - 1, D): position t predicts t + 1
        result = {}
        if share.any():
            result |= {"teacher_probs": family.text_logits(hidden[text]).float().softmax(-1), "teacher_probs_weight": share}
    if teaches_codes:
        before = hidden[gen_mask[:, 1:]].split([family.dense_placeholders(grid) for grid in grids])
        states = [  # M times (T, D), without the states before EOL tokens
            image_states.unflatten(0, (rows, -1))[:, :columns].flatten(0, 1)
            for image_states, (rows, columns) in zip(before, grids, strict=True)
        ]
        result |= {"teacher_states": pad_sequence(states, batch_first=True), "teacher_states_weight": weight}
    return result


def _dense_hidden(
    model: UniCompressModel,
    batch: dict[str, torch.Tensor],
    gen_mask: torch.Tensor,
    codes: list[torch.Tensor],
    grids: list[Grid],
) -> torch.Tensor:
    """Returns the dense base's last hidden states, (B, L, D), with the codes of the images to draw as its inputs."""
    family, ids, mask = model.family, batch["input_ids"], batch["attention_mask"]
    read = {name: batch[name] for name in ("pixel_values", "image_sizes") if name in batch}
    if family.shared_vocabulary and family.compresses_reading:
        image_tokens = [  # as the base draws them, with EOL tokens, but without the tokens that end an image
            family.to_tokens(image_codes[None], grid)[0, : family.dense_placeholders(grid)]
            for image_codes, grid in zip(codes, grids, strict=True)
        ]
        ids = ids.masked_scatter(gen_mask, torch.cat(image_tokens)) if codes else ids
        return family.base.model(input_ids=ids, attention_mask=mask, use_cache=False, **read).last_hidden_state
    to_read, images = (ids == family.image_token_id) & ~gen_mask, Images(**read)
    embeddings = model.read_layer.embed_prompt(ids, images.pixel_values, images.image_sizes, to_read)  # (B, L, D)
    places = dense_reading(family, images, to_read)
    if codes:
        drawn = family.embed_codes(torch.cat(codes)[None])[0]  # (M * T, D)
        embeddings = embeddings.masked_scatter(gen_mask.unsqueeze(-1), drawn.to(embeddings.dtype))
        places = [*places, (gen_mask, [dense_deltas(family, grid) for grid in grids])]
    positions = sequence_positions(mask, places) if places else None
    return family.language_model(
        inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state


def dense_codes(family: Family, images: Images) -> list[torch.Tensor]:
    """Returns the base's own codes of each image to draw, M times (T,)."""
    grids = [family.draw_grid(size) for size in images.sizes(family)]
    if images.latents is not None:
        lengths = [rows * columns for rows, columns in grids]
        return [nearest_codes(image[:length], family.codebook) for image, length in zip(images.latents, lengths, strict=True)]
    codes: dict[int, torch.Tensor] = {}
    if images.pixel_values is not None:
        for rows, pixels, _ in family.by_size(images.pixel_values, images.image_sizes):
            codes.update(zip(rows, family.dense_codes(pixels), strict=True))
    return [codes[row] for row in range(len(grids))]
