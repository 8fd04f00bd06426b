"""The dense base as a teacher (`finetune.py --distill`).

The teacher is the base itself: the adapter disabled, the inputs rebuilt with the base's placeholder count. It sees the prompts
that inference would show it. What a dataset leaves out the teacher fills in (`filled_in`): answers to questions, drawings of
prompts.

Labels are learned. An answer of the dataset is learned as it stands: it may be one that the base would not give. Where the
answer is the base's own, its words are learned from the base's distribution over them, KL(teacher || student). Codes that
"strip" draws are learned from the teacher's distribution, and each hidden state from the teacher's at the same place
(`Drawing.divergence`), with a weight that falls linearly from 1 at the first step to 0 at the last, where the codes themselves
have taken over.
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
from .joint import JointTrainer, NamingCollator


def teacher_collator(collator: UniCompressCollator, processor: ProcessorMixin) -> UniCompressCollator:
    """Makes the dense base's batches of the rows of which `collator` makes the adapter's; `processor` is the base's own."""
    dense = replace(collator, processor=processor, config=replace(collator.config, stride=1, num_global_tokens=0))
    dense.dropout = collator.dropout  # the same rows lose their captions
    return dense


class TeacherCollator(NamingCollator):
    """Batches that bring the teacher's inputs, too, under `teacher`: the same rows as the dense base reads and draws them.

    `teacher` also has `taught`, (B,): whether the answers of a sequence are the teacher's own.

    Args:
        collator: The adapter's.
        processor: The base's own: its placeholder count is what the teacher reads and draws.
    """

    def __init__(self, collator: UniCompressCollator, processor: ProcessorMixin):
        super().__init__(collator)
        self.dense = teacher_collator(collator, processor)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        dense, of_rows = self.dense.with_rows(rows)
        dense["taught"] = torch.tensor([bool(rows[row].get("taught")) for row in of_rows])
        return super().__call__(rows) | {"teacher": dense}


class DistillationTrainer(JointTrainer):
    """A `JointTrainer` with the dense base as a teacher: of its own answers, and of the codes that "strip" draws.

    Args:
        teacher_processor: The base's own processor.
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
        if "teacher" in inputs:  # not where the model is evaluated: that is by labels alone
            # The teacher is the fastest way to its own quality, the codes themselves the way beyond it
            inputs |= self.taught(inputs.pop("teacher"), 1 - self.state.global_step / max(self.state.max_steps, 1))
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    @torch.no_grad()
    def taught(self, batch: dict[str, torch.Tensor], weight: float) -> dict[str, torch.Tensor | float]:
        """What the dense base says of a batch of its own inputs, for the adapter to learn with a weight from 0 to 1.

        Returns:
            If some answers are the base's own: `teacher_probs`, its probabilities at the N labelled text tokens, (N,
            vocabulary), and `teacher_probs_weight`, (N,), 1 in those answers and 0 elsewhere. If "strip" generates:
            `teacher_states`, its last hidden states before each dense code, (M, T, D), and `teacher_states_weight`, the weight.
        """
        model, family = self.model, self.model.family
        gen_mask = batch.get("gen_mask", torch.zeros_like(batch["input_ids"], dtype=torch.bool))
        words = ((batch["labels"] != -100) & ~gen_mask)[:, 1:]  # (B, L - 1)
        own = batch["taught"].unsqueeze(1).expand_as(words)[words].float()  # (N,)
        drawn = Images(*(batch.get(f"gen_{name}") for name in ("pixel_values", "image_sizes", "latents")))
        teaches_codes = drawn.values is not None and model.active_peft_config.decompressor == "strip"
        if not teaches_codes and not own.any():
            return {}
        codes, grids = dense_codes(family, drawn), [family.draw_grid(size) for size in drawn.sizes(family)]
        with model.disable_adapter():
            hidden = self._dense_hidden(batch, gen_mask, codes, grids)[:, :-1]  # (B, L - 1, D): position t predicts t + 1
            told = {}
            if own.any():
                told |= {"teacher_probs": family.text_logits(hidden[words]).float().softmax(-1), "teacher_probs_weight": own}
        if teaches_codes:
            before = hidden[gen_mask[:, 1:]].split([family.dense_placeholders(grid) for grid in grids])
            states = [  # M times (T, D): those before the ends of rows are left out
                of_image.unflatten(0, (rows, -1))[:, :columns].flatten(0, 1)
                for of_image, (rows, columns) in zip(before, grids, strict=True)
            ]
            told |= {"teacher_states": pad_sequence(states, batch_first=True), "teacher_states_weight": weight}
        return told

    def _dense_hidden(
        self, batch: dict[str, torch.Tensor], gen_mask: torch.Tensor, codes: list[torch.Tensor], grids: list[Grid]
    ) -> torch.Tensor:
        """The dense base's last hidden states, (B, L, D), the codes of drawn images at their places."""
        family, ids, mask = self.model.family, batch["input_ids"], batch["attention_mask"]
        read = {name: batch[name] for name in ("pixel_values", "image_sizes") if name in batch}
        if family.shared_vocabulary:
            for_images = [  # as the base draws them: with the ends of rows, but not that of the image
                family.to_tokens(of_image[None], grid)[0, : family.dense_placeholders(grid)]
                for of_image, grid in zip(codes, grids, strict=True)
            ]
            ids = ids.masked_scatter(gen_mask, torch.cat(for_images)) if codes else ids
            return family.base.model(input_ids=ids, attention_mask=mask, use_cache=False, **read).last_hidden_state
        to_read = (ids == family.image_token_id) & ~gen_mask
        embeddings = self.model.read_layer.embed_prompt(ids, read.get("pixel_values"), None, to_read)  # (B, L, D)
        if codes:
            drawn = family.embed_codes(torch.cat(codes)[None])[0]  # (M * T, D)
            embeddings = embeddings.masked_scatter(gen_mask.unsqueeze(-1), drawn.to(embeddings.dtype))
        return family.language_model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).last_hidden_state


def dense_codes(family: Family, images: Images) -> list[torch.Tensor]:
    """The base's own codes of each image to draw, M times (T,)."""
    grids = [family.draw_grid(size) for size in images.sizes(family)]
    if images.latents is not None:
        lengths = [rows * columns for rows, columns in grids]
        return [nearest_codes(one[:length], family.codebook) for one, length in zip(images.latents, lengths, strict=True)]
    codes: dict[int, torch.Tensor] = {}
    if images.pixel_values is not None:
        for rows, pixels, _ in family.by_size(images.pixel_values, images.image_sizes):
            codes.update(zip(rows, family.dense_codes(pixels), strict=True))
    return [codes[row] for row in range(len(grids))]
