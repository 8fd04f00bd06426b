"""The dense base as a teacher (`finetune.py --distill`): it answers, it draws, and its words are learned as it weighs them.

The teacher is the base itself: the adapter disabled, the inputs rebuilt with the base's placeholder count. What a dataset
leaves out the teacher fills in (`filled_in`): answers to questions, drawings of prompts. What is read is then learned from the
teacher's distribution over the words, KL(teacher || student), in place of the one word that the row names.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any

import torch
import torch.nn.functional as F
from conversations import decoded, fingerprint_of
from datasets import Dataset
from joint_stage import JointTrainer, NamingCollator
from stock_calls import calls_of, drawing_inputs, to_images
from training_rows import state_of
from transformers import ProcessorMixin

from uc_adapters import UniCompressCollator, UniCompressModel

ANSWER_TOKENS = 64


@torch.no_grad()
def filled_in(rows: Dataset, model: UniCompressModel, processor: ProcessorMixin, seed: int = 0) -> Dataset:
    """Rows of `conversations` whose questions the base has answered, and whose prompts it has drawn.

    Args:
        rows: Those that end in a user turn are answered, greedily; those that want an image drawn and have none are drawn.
        model: The base with an adapter, which is disabled for it.
        processor: The base's own.
        seed: Of the drawings.
    """
    base = model.get_base_model()

    def fill_in(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        told = {"messages": [], "images": []}
        for messages, images, index in zip(batch["messages"], batch["images"], indices, strict=True):
            row = {"messages": messages, "images": images}
            if messages and messages[-1]["role"] == "user":
                answer = _answer(base, processor, decoded(row))
                row["messages"] = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
            elif not images and any(part["type"] == "image" for turn in messages for part in turn["content"]):
                torch.manual_seed(seed * 1_000_003 + index)
                row["images"] = [{"path": None, "bytes": _drawing(base, processor, messages)}]
            for name in told:
                told[name].append(row[name])
        return told

    settings = rows._fingerprint, model.active_peft_config.base_fingerprint, state_of(processor), seed
    with model.disable_adapter(), torch.random.fork_rng():
        filled = rows.map(
            fill_in,
            batched=True,
            batch_size=16,
            with_indices=True,
            features=rows.features,
            new_fingerprint=fingerprint_of(*settings),
            desc="ask the base",
        )
    return filled


def _answer(base, processor: ProcessorMixin, row: dict) -> str:
    """What the base says to a conversation that ends in a user turn."""
    text = processor.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=row["images"] or None, return_tensors="pt").to(base.device)
    output = base.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def _drawing(base, processor: ProcessorMixin, messages: list[dict]) -> bytes:
    """A PNG of what the base draws for the words of the first turn."""
    calls = calls_of(base)
    prompt = " ".join(part["text"] for part in messages[0]["content"] if part["text"])
    inputs = drawing_inputs(processor, [prompt], calls).to(base.device)
    pixels = calls.pixels(base, calls.draw(base, inputs, do_sample=True), calls.grid(base, inputs))
    [image] = to_images(processor, pixels)
    file = BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


class TeacherCollator(NamingCollator):
    """Batches that bring the teacher's inputs, too: under `teacher`, those of the rows that only read; None where none does.

    Args:
        collator: The adapter's.
        processor: The base's own: its placeholder count is what the teacher reads.
    """

    def __init__(self, collator: UniCompressCollator, processor: ProcessorMixin):
        super().__init__(collator)
        self.dense = UniCompressCollator(processor, collator.config, caption_dropout=0.0)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        reading = [row for row in rows if not _draws(row)]
        return super().__call__(rows) | {
            "teacher": self.dense(reading) if reading else None,
            "teaches": torch.tensor([not _draws(row) for row in rows]),  # (B,)
        }


def _draws(row: dict) -> bool:
    return any(
        part["type"] == "image"
        for turn in row["messages"]
        if turn["role"] == "assistant" and not isinstance(turn["content"], str)
        for part in turn["content"]
    )


class DistillingTrainer(JointTrainer):
    """A `JointTrainer` whose words are learned from the dense base; drawn codes and the words of other rows as ever.

    Args:
        teacher_processor: The base's own processor.
    """

    def __init__(self, *args, teacher_processor: ProcessorMixin, data_collator: UniCompressCollator, **kwargs):
        super().__init__(*args, data_collator=data_collator, **kwargs)
        self.data_collator = TeacherCollator(data_collator, teacher_processor)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        teacher, teaches = inputs.pop("teacher"), inputs.pop("teaches")
        if teacher is not None:
            inputs["word_probs"] = self._word_probs(teacher, teaches, inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    @torch.no_grad()
    def _word_probs(self, teacher: dict, teaches: torch.Tensor, inputs: dict) -> torch.Tensor:
        """Probabilities of all labelled words of the batch, (N, vocabulary): the teacher's, or the label's in other rows."""
        labels = inputs["labels"][:, 1:]  # (B, L - 1)
        words = labels != -100
        if "drawn_mask" in inputs:
            words &= ~inputs["drawn_mask"][:, 1:]
        family, of_teacher = self.model.family, teacher.pop("labels")[:, 1:] != -100
        with self.model.disable_adapter():
            hidden = family.base.model(**teacher).last_hidden_state[:, :-1]  # (B', L' - 1, D)
            taught = family.text_logits(hidden[of_teacher]).float().softmax(-1)  # (N', vocabulary)
        self.model.train_only("language model")  # leaving disable_adapter makes all of the adapter trainable
        probs = F.one_hot(labels[words], taught.shape[-1]).float()  # (N, vocabulary)
        probs[(words & teaches[:, None])[words]] = taught
        return probs
