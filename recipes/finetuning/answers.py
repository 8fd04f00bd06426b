"""The dense base fills in what a dataset lacks: answers to questions, drawings of prompts (`finetune.py --distill`)."""

from __future__ import annotations

from io import BytesIO

import torch
from datasets import Dataset
from PIL.Image import Image
from rows.captions import caption_of, is_drawn
from rows.conversations import DatasetError, decoded, fingerprint_of
from rows.training_rows import state_of
from scoring.contenders import Contender, draw, reply
from transformers import ProcessorMixin

from uc_adapters import UniCompressModel
from uc_adapters.messages import malformed

ANSWER_TOKENS = 64
TOGETHER = 8  # rows in a batch of the base


@torch.no_grad()
def filled_in(rows: Dataset, model: UniCompressModel, processor: ProcessorMixin, seed: int = 0) -> Dataset:
    """Completes rows of `conversations` with the base's own answers and drawings.

    Args:
        rows: A row that ends in a user turn gets the base's greedy answer, unless that is empty. A prompt without its image
            gets the base's drawing. A row with an error is left unchanged; `training_rows` names it.
        model: The base with an adapter. The adapter is disabled meanwhile.
        processor: The base's own processor.
        seed: Seed of the drawings. The base draws eight at once.

    Raises:
        DatasetError: There is a prompt to draw, and the base cannot draw.
    """
    teacher, why_no_drawing = Contender("base", model.get_base_model(), processor), model.family.why_no_drawing

    def fill_in(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        rows = [
            {"messages": messages, "images": images, "taught": False}
            for messages, images in zip(batch["messages"], batch["images"], strict=True)
        ]
        asked = [(row, question) for row in rows if (question := _question(row, processor))]
        if asked:
            images = [image for _, question in asked for image in question["images"]]
            answers = reply(teacher, [question["messages"] for _, question in asked], images, ANSWER_TOKENS)
            for (row, _), answer in zip(asked, answers, strict=True):
                if answer:
                    # Beside answers of the dataset, which are learned as labels, this one is learned as a label, too.
                    row["taught"] = all(turn["role"] != "assistant" for turn in row["messages"])
                    row["messages"] = [*row["messages"], {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        prompts = [index for index, row in enumerate(rows) if _is_prompt(row, processor)]
        if prompts:
            if why_no_drawing is not None:
                origin = batch["origin"][prompts[0]]
                raise DatasetError(
                    f"{origin} is a prompt to draw, and the base cannot draw: {why_no_drawing}. Leave such rows out."
                )
            torch.manual_seed(seed * 1_000_003 + indices[0])
            drawings, _ = draw(teacher, [caption_of(rows[index]) for index in prompts], do_sample=True)
            for index, drawing in zip(prompts, drawings, strict=True):
                rows[index]["images"] = [{"path": None, "bytes": _png(drawing)}]
        return {name: [row[name] for row in rows] for name in ("messages", "images", "taught")}

    settings = rows._fingerprint, model.active_peft_config.base_fingerprint, state_of(processor), seed
    with model.disable_adapter(), torch.random.fork_rng():
        filled = rows.map(
            fill_in,
            batched=True,
            batch_size=TOGETHER,
            with_indices=True,
            features=rows.features,
            new_fingerprint=fingerprint_of(*settings),
            desc="ask the base",
        )
    return filled


def _question(row: dict, processor: ProcessorMixin) -> dict | None:
    """The row, decoded, if it ends in a user turn; None if it does not, or has an error."""
    messages = row["messages"]
    if malformed(messages, processor) or messages[-1]["role"] != "user":
        return None
    parts = sum(part["type"] == "image" for turn in messages for part in turn["content"])
    try:
        return decoded(row) if len(row["images"]) == parts else None
    except Exception:  # a damaged file can raise anything
        return None


def _is_prompt(row: dict, processor: ProcessorMixin) -> bool:
    """Whether a row is a caption without its image, and has no error."""
    return not malformed(row["messages"], processor) and is_drawn(row) and not row["images"]


def _png(image: Image) -> bytes:
    file = BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
