"""Measures a training step on dense image tokens and on compact ones, for `benchmark.py --train`.

Both sides train a LoRA of the same size in the language models of twins that share their weights. The dense side is stock PEFT
on stock Janus. The compact side is stage 2, as `finetune.py` runs it, once without a teacher and once with the dense base as
its teacher. They only differ in the number of image tokens, and in the teacher. Each side encodes the pixels that it reads,
takes the latents of the images to draw from a cache, as `finetune.py` does, runs the LM head on the answer alone, and updates
with AdamW.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import JanusForConditionalGeneration

from uc_adapters import UniCompressModel
from uc_adapters.families import family_of
from uc_adapters.layers import nearest_codes
from uc_adapters.training import teacher_targets

ANSWER_TOKENS = 16  # learned tokens, after an image and a question
MEMORY = {
    "cpu": "kept for backward: bytes that a forward saves, each storage once, parameters excluded",
    "cuda": "peak of a step: most GPU memory allocated in it, less what was allocated before it",
}


class Trainee(ABC):
    """One side of the comparison, with its losses and its step.

    Args:
        model: The model with the adapter to train.
        gradient_checkpointing: Whether to keep only the inputs of each layer, and to recompute the rest in the backward pass.
    """

    def __init__(self, model: PeftModel, gradient_checkpointing: bool):
        self.model = model.train()
        if gradient_checkpointing:
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    @abstractmethod
    def drawing_loss(self, words: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The loss of drawing images, given by their VQ latents (B, T, C), after prompts of text tokens (B, W)."""

    @abstractmethod
    def reading_loss(self, words: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """The loss of the answers at the end of the text tokens (B, W); images (B, 3, H, W) are after the first token."""

    def step(self, loss: Callable[[], torch.Tensor]) -> None:
        """Forward, backward, update."""
        loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _with_images(self, words: torch.Tensor, count: int, position: int) -> torch.Tensor:
        """Text tokens (B, W) with `count` image placeholders inserted at `position`, (B, W + count)."""
        placeholders = words.new_full((len(words), count), self.model.config.image_token_id)
        return torch.cat([words[:, :position], placeholders, words[:, position:]], 1)


class DenseLora(Trainee):
    """A Janus trained on all tokens of its images."""

    def drawing_loss(self, words: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        base = self.model.get_base_model()
        codes = nearest_codes(latents, family_of(base).codebook)  # (B, T)
        drawn = base.prepare_embeddings_for_image_generation(codes[:, :-1])  # (B, T - 1, D)
        embeddings = torch.cat([base.get_input_embeddings()(words), drawn], 1)
        hidden = base.model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        logits = base.model.generation_head(hidden[:, words.shape[1] - 1 :])  # (B, T, K)
        return F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())

    def reading_loss(self, words: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        config = self.model.config.vision_config
        ids = self._with_images(words, (config.image_size // config.patch_size) ** 2, 1)
        # With labels instead of logits_to_keep, the base would compute the logits of every image token, too
        logits = self.model(input_ids=ids, pixel_values=pixels, use_cache=False, logits_to_keep=ANSWER_TOKENS + 1).logits
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), words[:, -ANSWER_TOKENS:].flatten())


class Compact(Trainee):
    """An adapter in stage 2."""

    def drawing_loss(self, words: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        side, config = self.model.family.geometry.draw_side, self.model.active_peft_config
        batch = self._drawing_batch(words, latents, config.num_gen_tokens((side, side)))
        first = words.shape[1]  # learned global tokens and the separator are not learned to be drawn
        batch["labels"][:, first + config.num_global_codes : first + config.num_drawing_globals + 1] = -100
        return self.model(**batch, **self.targets(words, latents)).loss

    def targets(self, words: torch.Tensor, latents: torch.Tensor) -> dict:
        """The teacher's arguments of the model; empty without a teacher."""
        return {}

    def _drawing_batch(self, words: torch.Tensor, latents: torch.Tensor, count: int) -> dict[str, torch.Tensor]:
        ids = self._with_images(words, count, words.shape[1])  # (B, W + count)
        drawn = (torch.arange(ids.shape[1], device=ids.device) >= words.shape[1]).expand_as(ids)
        return {"input_ids": ids, "labels": ids.masked_fill(~drawn, -100), "gen_latents": latents, "gen_mask": drawn}

    def reading_loss(self, words: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        ids = self._with_images(words, self.model.num_image_tokens, 1)
        labels = torch.full_like(ids, -100)
        labels[:, -ANSWER_TOKENS:] = ids[:, -ANSWER_TOKENS:]
        return self.model(input_ids=ids, labels=labels, pixel_values=pixels, fused_lm_head=True).loss  # as TRL calls it


class Taught(Compact):
    """An adapter in stage 2, with the dense base as its teacher."""

    def targets(self, words: torch.Tensor, latents: torch.Tensor) -> dict:
        dense = self._drawing_batch(words, latents, self.model.family.geometry.draw_side**2)
        others = {"attention_mask": torch.ones_like(dense["input_ids"]), "taught": torch.zeros(len(words), device=words.device)}
        return teacher_targets(self.model, dense | others, weight=0.5)


def with_same_lora(base: JanusForConditionalGeneration, adapter: UniCompressModel) -> PeftModel:
    """A base with a stock LoRA of the adapter's rank, in the same layers."""
    config = adapter.active_peft_config
    layers = [name for name, module in adapter.get_base_model().named_modules() if isinstance(module, LoraLayer)]
    return get_peft_model(base, LoraConfig(r=config.r, lora_alpha=config.lora_alpha, target_modules=layers))


def trainees(models: dict[str, nn.Module], gradient_checkpointing: bool) -> dict[str, Trainee]:
    """The sides: dense LoRA on the bare base, and the adapter in stage 2, without and with a teacher."""
    models["adapter"].train_only("language model")
    return {
        "base": DenseLora(with_same_lora(models["base"], models["adapter"]), gradient_checkpointing),
        "adapter": Compact(models["adapter"], gradient_checkpointing),
        "adapter, taught": Taught(models["adapter"], gradient_checkpointing),
    }


def training_figures(
    models: dict[str, nn.Module],
    prompts: torch.Tensor,
    pixels: torch.Tensor,
    gradient_checkpointing: bool,
    timed: Callable[..., dict[str, float]],
) -> dict:
    """Seconds, images per second and bytes of a step that learns to draw images, and of one that learns to read them.

    Args:
        models: The bare base, and the adapter on a twin of it. Both are trained.
        prompts: Text tokens before each image to draw, (B, W).
        pixels: The images, (B, 3, H, W).
        gradient_checkpointing: See `Trainee`.
        timed: A function from works by name to the seconds of each. Its keyword `what` describes the works.
    """
    sides = trainees(models, gradient_checkpointing)
    with torch.no_grad():
        latents = models["adapter"].family.latents(pixels)
    questions = torch.cat([prompts, prompts[:, -ANSWER_TOKENS:]], 1)  # any tokens can serve as an answer
    losses = {
        "drawing": {name: partial(side.drawing_loss, prompts, latents) for name, side in sides.items()},
        # Without answers of the base's own, the teacher is not asked about images to read
        "reading": {name: partial(sides[name].reading_loss, questions, pixels) for name in ("base", "adapter")},
    }
    training = {}
    for what, loss in losses.items():
        seconds = timed({name: partial(sides[name].step, work) for name, work in loss.items()}, what=f"train {what} in turn")
        training[what] = {
            "seconds": seconds,
            "ratio": seconds["base"] / seconds["adapter"],
            "images_per_second": {name: len(pixels) / taken for name, taken in seconds.items()},
            "activation_bytes": {name: activation_bytes(sides[name], work) for name, work in loss.items()},
        }
    return {"training": training, "activation_bytes_are": MEMORY[pixels.device.type]}


def table_rows(figures: dict) -> list[tuple[str, str, dict[str, float]]]:
    """The rows of a table: what is compared, its unit, and the figures of both sides."""
    counted, rows = figures["activation_bytes_are"].partition(":")[0], []
    for what, found in figures["training"].items():
        rows.append((f"training, {what}, a step", "s", found["seconds"]))
        rows.append(
            (f"training, {what}, {counted}", "MB", {name: size / 1e6 for name, size in found["activation_bytes"].items()})
        )
    return rows


def activation_bytes(side: Trainee, loss: Callable[[], torch.Tensor]) -> int:
    """The memory of a step beside weights and optimiser state, measured as `MEMORY` says for the device.

    With gradient checkpointing, the CPU's count leaves out the one layer at a time that the backward pass computes again.
    """
    if side.model.device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        side.step(loss)
        return torch.cuda.max_memory_allocated() - before
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*side.model.parameters(), *side.model.buffers())}
    kept: weakref.WeakSet[_Saved] = weakref.WeakSet()  # a weak set, to leave out tensors of parts of the graph that are gone

    def pack(tensor: torch.Tensor) -> _Saved:
        saved = _Saved(tensor)
        kept.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        output = loss()  # holds the graph, which holds the saved tensors
    storages = {saved.storage.data_ptr(): saved.storage.nbytes() for saved in kept}  # views share a storage
    del output
    return sum(size for pointer, size in storages.items() if pointer not in weights)


class _Saved:
    """A tensor that autograd saved. It lives as long as autograd needs it."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.storage = tensor, tensor.untyped_storage()
