"""The dense base as a teacher (`finetune.py --distill`): it answers, it draws, and its words are learned as it weighs them.

The teacher is the base itself: the adapter disabled, the inputs rebuilt with the base's placeholder count. What a dataset
leaves out the teacher fills in (`filled_in`): answers to questions, drawings of prompts. Words are then learned from the
teacher's distribution over them, KL(teacher || student), in place of the one word that the row names. So are codes that "strip"
draws, since it draws them in the base's own order: token by token from the teacher's distribution, and each hidden state from
the teacher's at the same place (`Drawing.divergence`).
"""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from typing import Any

import torch
from conversations import DatasetError, decoded, fingerprint_of
from datasets import Dataset
from joint_stage import JointTrainer, NamingCollator
from sample_pictures import is_drawn
from stock_calls import calls_of, drawing_inputs, to_images
from torch.nn.utils.rnn import pad_sequence
from training_rows import malformed, state_of
from transformers import ProcessorMixin

from uc_adapters import UniCompressCollator, UniCompressModel
from uc_adapters.families import Family
from uc_adapters.images import Images
from uc_adapters.layers import Grid, nearest_codes

ANSWER_TOKENS = 64


@torch.no_grad()
def filled_in(rows: Dataset, model: UniCompressModel, processor: ProcessorMixin, seed: int = 0) -> Dataset:
    """Rows of `conversations` whose questions the base has answered, and whose prompts it has drawn.

    Args:
        rows: Those that end in a user turn are answered, greedily, unless the base has no word to say; a prompt whose image is
            missing is drawn. Rows with something wrong stay as they are: `training_rows` names them.
        model: The base with an adapter, which is disabled for it.
        processor: The base's own.
        seed: Of the drawings.

    Raises:
        DatasetError: A prompt to draw, for a base that cannot.
    """
    base, why_no_drawing = model.get_base_model(), model.family.why_no_drawing

    def fill_in(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        told = {"messages": [], "images": []}
        for messages, images, origin, index in zip(*(batch[name] for name in (*told, "origin")), indices, strict=True):
            row = {"messages": messages, "images": images}
            if _is_question(row, processor.image_token):
                answer = _answer(base, processor, decoded(row))
                if answer:
                    row["messages"] = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
            elif is_drawn(row) and not images and not malformed(messages, processor.image_token):
                if why_no_drawing is not None:
                    raise DatasetError(f"{origin} is a prompt for the base to draw, which cannot: {why_no_drawing}.")
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


def _is_question(row: dict, image_token: str) -> bool:
    """Whether a row, with nothing wrong in it, ends in a user turn."""
    messages = row["messages"]
    if malformed(messages, image_token) or messages[-1]["role"] != "user":
        return False
    places = sum(part["type"] == "image" for turn in messages for part in turn["content"])
    try:
        return len(decoded(row)["images"]) == places
    except Exception:  # whatever a file may hold
        return False


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


def teacher_collator(collator: UniCompressCollator, processor: ProcessorMixin) -> UniCompressCollator:
    """Makes the dense base's batches of the rows of which `collator` makes the adapter's; `processor` is the base's own."""
    return replace(collator, processor=processor, config=replace(collator.config, stride=1, num_global_tokens=0))


class TeacherCollator(NamingCollator):
    """Batches that bring the teacher's inputs, too, under `teacher`: the same rows as the dense base reads and draws them.

    Args:
        collator: The adapter's.
        processor: The base's own: its placeholder count is what the teacher reads and draws.
    """

    def __init__(self, collator: UniCompressCollator, processor: ProcessorMixin):
        super().__init__(collator)
        self.dense = teacher_collator(collator, processor)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        self.dense.epoch = self.collator.epoch  # the same rows lose their captions
        return super().__call__(rows) | {"teacher": self.dense(rows)}


class DistillingTrainer(JointTrainer):
    """A `JointTrainer` whose words are learned from the dense base, and whose codes are, if "strip" draws them: all of their
    loss at first, nothing of it at the end, when the codes of the images have taken over.

    Args:
        teacher_processor: The base's own processor.
    """

    def __init__(self, *args, teacher_processor: ProcessorMixin, data_collator: UniCompressCollator, **kwargs):
        super().__init__(*args, data_collator=data_collator, **kwargs)
        self.data_collator = TeacherCollator(data_collator, teacher_processor)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs |= self.taught(inputs.pop("teacher"))
        if "drawn_states" in inputs:
            # The teacher is the fastest way to its own quality, the codes themselves the way beyond it
            inputs["drawn_states_share"] = 1 - self.state.global_step / max(self.state.max_steps, 1)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    @torch.no_grad()
    def taught(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the dense base says of a batch of its own inputs, for the adapter to learn.

        Returns:
            `word_probs`, its probabilities of the N labelled words, (N, vocabulary); where "strip" draws, also `drawn_states`,
            its last hidden states before each dense code of the images to draw, (M, T, D).
        """
        model, family = self.model, self.model.family
        drawn_mask = batch.get("drawn_mask", torch.zeros_like(batch["input_ids"], dtype=torch.bool))
        drawn = Images(*(batch.get(f"drawn_{name}") for name in ("pixel_values", "image_sizes", "latents")))
        codes, grids = dense_codes(family, drawn), [family.draw_grid(size) for size in drawn.sizes(family)]
        words = (batch["labels"] != -100) & ~drawn_mask
        with model.disable_adapter():
            hidden = self._dense_hidden(batch, drawn_mask, codes, grids)[:, :-1]  # (B, L - 1, D): position t predicts t + 1
            told = {"word_probs": family.text_logits(hidden[words[:, 1:]]).float().softmax(-1)}
        model.train_only("language model")  # leaving disable_adapter makes all of the adapter trainable
        if codes and model.active_peft_config.decompressor == "strip":
            before = hidden[drawn_mask[:, 1:]].split([family.dense_placeholders(grid) for grid in grids])
            states = [  # M times (T, D): those before the ends of rows are left out
                of_image.unflatten(0, (rows, -1))[:, :columns].flatten(0, 1)
                for of_image, (rows, columns) in zip(before, grids, strict=True)
            ]
            told["drawn_states"] = pad_sequence(states, batch_first=True)
        return told

    def _dense_hidden(
        self, batch: dict[str, torch.Tensor], drawn_mask: torch.Tensor, codes: list[torch.Tensor], grids: list[Grid]
    ) -> torch.Tensor:
        """The dense base's last hidden states, (B, L, D), the codes of drawn images at their places."""
        family, ids, mask = self.model.family, batch["input_ids"], batch["attention_mask"]
        read = {name: batch[name] for name in ("pixel_values", "image_sizes") if name in batch}
        if family.codes_are_words:
            for_images = [  # as the base draws them: with the ends of rows, but not that of the image
                family.to_tokens(of_image[None], grid)[0, : family.dense_placeholders(grid)]
                for of_image, grid in zip(codes, grids, strict=True)
            ]
            ids = ids.masked_scatter(drawn_mask, torch.cat(for_images)) if codes else ids
            return family.base.model(input_ids=ids, attention_mask=mask, use_cache=False, **read).last_hidden_state
        to_read = (ids == family.image_token_id) & ~drawn_mask
        embeddings = self.model.reading.embed_prompt(ids, read.get("pixel_values"), None, to_read)  # (B, L, D)
        if codes:
            drawn = family.embed_codes(torch.cat(codes)[None])[0]  # (M * T, D)
            embeddings = embeddings.masked_scatter(drawn_mask.unsqueeze(-1), drawn.to(embeddings.dtype))
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
