"""The joint loss over words and drawn codes, under the names that TRL's trainers read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .drawing import Drawing
from .hosts import ReadHost


@dataclass
class JointOutput(ModelOutput):
    """Per-token scores of text and drawn codes alike, as TRL's trainers read them.

    Attributes:
        loss: Mean negative log-probability over the labelled positions (sum, where divided by `num_items_in_batch`).
        log_probs: (B, L - 1), of the label at the next position; zero where there is none.
        entropy: (B, L - 1), in nats.
        is_top1: (B, L - 1), 1 where the label is the most probable token; a cell counts the share of its codes.
        label_mask: (B, L - 1), True where there is a label.
    """

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None


def joint_loss(
    reading: ReadHost,
    drawing: Drawing | None,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    *,
    pixel_values: torch.Tensor | None,
    image_sizes: torch.Tensor | None,
    drawn_pixel_values: torch.Tensor | None,
    drawn_image_sizes: torch.Tensor | None,
    drawn_mask: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None,
) -> JointOutput:
    """Scores the labels of a batch: words by the base's head, drawn places by the adapter's decompressor.

    Args: as those of `UniCompressModel.forward`, checked there.
    """
    family = reading.family
    if drawn_mask is None:
        drawn_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    read_mask = (input_ids == family.image_token_id) & ~drawn_mask
    embeddings = reading.embed_prompt(input_ids, pixel_values, image_sizes, read_mask)  # (B, L, D)
    batches = []  # images of one size each, with their rows in drawn_pixel_values
    if drawn_pixel_values is not None:
        by_size = family.by_size(drawn_pixel_values, drawn_image_sizes)
        batches = [(rows, drawing.compress(pixels)) for rows, pixels, _ in by_size]
        places = {}
        for rows, codes in batches:
            places.update(zip(rows, drawing.embed(codes), strict=True))  # (N_g + 1 + T', D) each
        places = [places[row] for row in range(len(places))]
        embeddings = embeddings.masked_scatter(drawn_mask.unsqueeze(-1), torch.cat(places).to(embeddings.dtype))
    hidden = family.language_model(
        inputs_embeds=embeddings, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    ).last_hidden_state[:, :-1]  # (B, L - 1, D): position t predicts t + 1
    targets, drawn = labels[:, 1:], drawn_mask[:, 1:]
    label_mask = targets != -100
    text = label_mask & ~drawn
    scores = _score_text(family.text_logits(hidden[text]), targets[text])
    fields = [torch.zeros(targets.shape, device=hidden.device).masked_scatter(text, score) for score in scores]
    if batches:
        before = hidden[drawn].split([len(place) for place in places])  # M times (N_g + 1 + T', D)
        drawn_scores = {}
        for rows, codes in batches:
            scored = drawing.score(torch.stack([before[row] for row in rows]), codes)
            parts = torch.stack([scored.log_probs, scored.entropy, scored.accuracy])  # (3, n, N_g + 1 + T')
            drawn_scores.update(zip(rows, parts.unbind(1), strict=True))
        parts = torch.cat([drawn_scores[row] for row in range(len(drawn_scores))], 1)  # (3, places of all images)
        fields = [field.masked_scatter(drawn, part) * label_mask for field, part in zip(fields, parts, strict=True)]
    log_probs, entropy, is_top1 = fields
    count = label_mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return JointOutput(
        loss=-log_probs.sum() / count,
        log_probs=log_probs,
        entropy=entropy.detach(),
        is_top1=is_top1.detach(),
        label_mask=label_mask,
    )


def _score_text(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probability, entropy and top-1 hit of targets (N,) under logits (N, vocabulary), each (N,)."""
    log_probs = logits.float().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    hits = (log_probs.argmax(-1) == targets).float()
    return log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy, hits
