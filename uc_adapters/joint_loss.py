"""The joint loss over text tokens and image codes. Its output has the field names that TRL's trainers read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.utils import ModelOutput

from .code_head import CodeHead, CompactCodes
from .errors import InputError, UnsupportedError
from .images import Images
from .positions import dense_reading, sequence_positions
from .tuner_layers import ReadLayer

# The kinds of labelled positions in `JointOutput.kinds`; 0 marks a position without a label
TEXT, GLOBAL_CODE, CODES = 1, 2, 3


@dataclass
class JointOutput(ModelOutput):
    """Per-token scores of text tokens and image codes, as TRL's trainers read them.

    Attributes:
        loss: Mean negative log-probability over the labelled positions; with `num_items_in_batch`, the sum divided by it.
        log_probs: Log-probability of the label at the next position, (B, L - 1); zero at positions without a label.
        entropy: Entropy of the prediction in nats, (B, L - 1).
        is_top1: 1 if the label is the most probable token, (B, L - 1); for a step of several codes, the share of such codes.
        label_mask: True at positions with a label, (B, L - 1).
        kinds: Kind of each label, (B, L - 1): 1 a text token, 2 a global code, 3 the codes of a step, 0 no label.
    """

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    kinds: torch.Tensor | None = None

    @property
    def mean_logits(self):
        """The field that only TRL's preference trainers read.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            "TRL's preference trainers (DPO, KTO) compare an adapter with its disabled base on the same tokens, but the two "
            "read an image in different numbers of tokens; expected SFTTrainer. Use it, and train on the chosen answers."
        )


def joint_loss(
    read_layer: ReadLayer,
    head: CodeHead | None,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    *,
    read: Images,
    drawn: Images,
    drawn_heads: list[CodeHead],
    gen_mask: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None,
    teacher_probs: torch.Tensor | None,
    teacher_probs_weight: torch.Tensor | float,
    teacher_states: torch.Tensor | None,
    teacher_states_weight: float,
) -> JointOutput:
    """Scores the labels of a batch: text tokens with the base's head, image codes with the adapter's code head.

    `UniCompressModel.forward` documents and checks the arguments. `read` and `drawn` are its images to read and to draw, and
    `drawn_heads` has the code head of each of the latter.
    """
    family = read_layer.family
    if gen_mask is None:
        gen_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    read_mask = (input_ids == family.image_token_id) & ~gen_mask
    embeddings = read_layer.embed_prompt(input_ids, read.pixel_values, read.image_sizes, read_mask)  # (B, L, D)
    batches = [] if drawn.values is None else list(_compress(drawn_heads, drawn))
    if batches:
        inputs, position_deltas = {}, {}
        for rows, of_rows, codes in batches:
            inputs.update(zip(rows, of_rows.embed(codes), strict=True))  # (N + 1 + T', D) each
            position_deltas.update(dict.fromkeys(rows, of_rows.position_deltas(codes.grid)))  # (..., N + 1 + T' + 1) each
        inputs, position_deltas = ([by_row[row] for row in range(len(by_row))] for by_row in (inputs, position_deltas))
        embeddings = embeddings.masked_scatter(gen_mask.unsqueeze(-1), torch.cat(inputs).to(embeddings.dtype))
        if attention_mask is None:  # without it, transformers would take jumps in the position ids for packed sequences
            attention_mask = torch.ones_like(input_ids)
        if position_ids is None:
            images = [(gen_mask, position_deltas), *dense_reading(family, read, read_mask)]
            position_ids = sequence_positions(attention_mask, images)
    hidden = family.language_model(
        inputs_embeds=embeddings, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    ).last_hidden_state[:, :-1]  # (B, L - 1, D): position t predicts t + 1
    targets, drawn_targets = labels[:, 1:], gen_mask[:, 1:]
    label_mask = targets != -100
    text = label_mask & ~drawn_targets
    scores = _score_text(family.text_logits(hidden[text]), targets[text], teacher_probs, teacher_probs_weight)
    fields = [torch.zeros(targets.shape, device=hidden.device).masked_scatter(text, score) for score in scores]
    kinds = text.long() * TEXT
    if batches:
        before = hidden[drawn_targets].split([len(image) for image in inputs])  # M times (N + 1 + T', D)
        drawn_scores = {}
        for rows, of_rows, codes in batches:
            states = None if teacher_states is None else teacher_states[rows, : codes.dense.shape[1]]
            scored = of_rows.score(torch.stack([before[row] for row in rows]), codes, states, teacher_states_weight)
            code_kinds = torch.full_like(scored.log_probs, CODES)
            code_kinds[:, : codes.globals.shape[1]] = GLOBAL_CODE
            parts = torch.stack([scored.log_probs, scored.entropy, scored.accuracy, code_kinds])  # (4, n, N + 1 + T')
            drawn_scores.update(zip(rows, parts.unbind(1), strict=True))
        *parts, code_kinds = torch.cat([drawn_scores[row] for row in range(len(drawn_scores))], 1)  # (4, tokens of all images)
        fields = [field.masked_scatter(drawn_targets, part) * label_mask for field, part in zip(fields, parts, strict=True)]
        kinds = kinds.masked_scatter(drawn_targets, code_kinds.long()) * label_mask
    log_probs, entropy, is_top1 = fields
    log_probs = log_probs + _touch(read_layer, head)
    count = label_mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return JointOutput(
        loss=-log_probs.sum() / count,
        log_probs=log_probs,
        entropy=entropy.detach(),
        is_top1=is_top1.detach(),
        label_mask=label_mask,
        kinds=kinds,
    )


def _compress(heads: list[CodeHead], images: Images) -> Iterator[tuple[list[int], CodeHead, CompactCodes]]:
    """Yields the codes to draw for the images of each size and number of codes in a step, with their indices and their head."""
    family = heads[0].family
    if images.latents is None:
        by_size = family.by_size(images.pixel_values, images.image_sizes)
    else:
        sizes = images.sizes(family)
        groups = {size: [row for row, other in enumerate(sizes) if other == size] for size in dict.fromkeys(sizes)}
        by_size = ((rows, images.latents[rows, : math.prod(family.draw_grid(size))], size) for size, rows in groups.items())
    for rows, values, size in by_size:
        for length in dict.fromkeys(heads[row].codes_per_step for row in rows):
            places = [place for place, row in enumerate(rows) if heads[row].codes_per_step == length]
            chosen, head = [rows[place] for place in places], heads[rows[places[0]]]
            of_length = values if len(places) == len(rows) else values[places]
            if images.latents is None:
                yield chosen, head, head.compress(of_length)
            else:
                yield chosen, head, head.compress_latents(of_length, family.draw_grid(size))


def _touch(read_layer: ReadLayer, head: CodeHead | None) -> torch.Tensor:
    """Returns a zero that depends on every trainable weight of the adapter's modules.

    A batch that only reads, or only draws, does not use all of them. But in distributed training each process needs a gradient
    for every weight, and one process must train as two do.
    """
    modules = [read_layer.active_module()] + ([] if head is None else [head.module])
    weights = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
    return sum((weight.flatten()[0].float() * 0 for weight in weights), torch.zeros((), device=read_layer.family.device))


def _score_text(
    logits: torch.Tensor, targets: torch.Tensor, probs: torch.Tensor | None, share: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns log-probability, entropy and top-1 hit of targets (N,) under logits (N, vocabulary), each (N,).

    With a teacher's probabilities, `probs` (N, vocabulary), the log-probability is mixed with -KL(teacher || student), which
    has the weight `share` (one number, or (N,)).
    """
    log_probs = logits.float().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    hits = (log_probs.argmax(-1) == targets).float()
    label_log_probs = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    if probs is None:
        return label_log_probs, entropy, hits
    if probs.shape != log_probs.shape:
        raise InputError(
            f"teacher_probs of shape {tuple(probs.shape)}; expected {tuple(log_probs.shape)}: the probability of each "
            "token of the vocabulary, at each labelled text token of the batch. Compute them from the same labels."
        )
    divergence = F.kl_div(log_probs, probs.float(), reduction="none").sum(-1)
    return (1 - share) * label_log_probs - share * divergence, entropy, hits
