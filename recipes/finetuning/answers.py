"""What a dataset leaves out the dense base fills in: answers to questions, drawings of prompts (`finetune.py --distill`)."""

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
TOGETHER = 8  # rows that the base is asked at once


@torch.no_grad()
def filled_in(rows: Dataset, model: UniCompressModel, processor: ProcessorMixin, seed: int = 0) -> Dataset:
    """Rows of `conversations` whose questions the base has answered, and whose prompts it has drawn.

    Args:
        rows: Those that end in a user turn are answered, greedily, unless the base has no word to say; a prompt whose image is
            missing is drawn. Rows with something wrong stay as they are: `training_rows` names them.
        model: The base with an adapter, which is disabled for it.
        processor: The base's own.
        seed: Of the drawings, which are drawn eight at once.

    Raises:
        DatasetError: A prompt to draw, for a base that cannot.
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
                    row["taught"] = all(turn["role"] != "assistant" for turn in row["messages"])  # else labels are learned, too
                    row["messages"] = [*row["messages"], {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        prompts = [place for place, row in enumerate(rows) if _is_prompt(row, processor)]
        if prompts:
            if why_no_drawing is not None:
                origin = batch["origin"][prompts[0]]
                raise DatasetError(f"{origin} is a prompt for the base to draw, which cannot: {why_no_drawing}.")
            torch.manual_seed(seed * 1_000_003 + indices[0])
            drawings, _ = draw(teacher, [caption_of(rows[place]) for place in prompts], do_sample=True)
            for place, drawing in zip(prompts, drawings, strict=True):
                rows[place]["images"] = [{"path": None, "bytes": _png(drawing)}]
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
    """A row that ends in a user turn, decoded; None where it does not, or something is wrong with it."""
    messages = row["messages"]
    if malformed(messages, processor) or messages[-1]["role"] != "user":
        return None
    places = sum(part["type"] == "image" for turn in messages for part in turn["content"])
    try:
        return decoded(row) if len(row["images"]) == places else None
    except Exception:  # whatever a file may hold
        return None


def _is_prompt(row: dict, processor: ProcessorMixin) -> bool:
    """Whether a row, with nothing wrong in it, is a caption whose image is missing."""
    return not malformed(row["messages"], processor) and is_drawn(row) and not row["images"]


def _png(image: Image) -> bytes:
    file = BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
