"""Scores a base and an adapter side by side on scenes of held-out digits: reading, drawing, tokens, seconds, nats.

    python recipes/evaluate.py --base model_cards/tiny-janus --adapter model_cards/tiny-janus-uc4x \\
        --scenes 500 --seed 1 --json scores.json

Needs: pip install -c constraints.txt -e ".[recipes]". About six minutes on two CPU cores.
Drawings are judged by a classifier trained on the real scans (`digits.judge`), no part of the model. Base and adapter
draw the same prompts in turn, batch by batch; the seconds are those of the drawings that are judged, end to end
(language model, decompressor, image decoder), after a warm-up batch each.
"""

from __future__ import annotations

import copy
import json
import math
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from digits import IMAGE_SIZE, QUESTION_KINDS, Scene, judge, random_scene, right_cells
from PIL import Image
from stock_calls import base_of, calls_of, drawing_inputs, to_images
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin
from trl import TrlParser

import uc_adapters
from uc_adapters import CardFacts, UniCompressCollator, UniCompressModel
from uc_adapters.families import family_of
from uc_adapters.hub.card import update_card
from uc_adapters.layers import Grid

SPLIT = "held-out"


@dataclass
class EvaluateArguments:
    """What to score, and how."""

    base: str = field(default="model_cards/tiny-janus", metadata={"help": "The dense base: folder or Hub id."})
    adapter: str | None = field(default=None, metadata={"help": "The adapter: folder or Hub id. None: the base alone."})
    scenes: int = field(default=500, metadata={"help": "Held-out scenes to read, and prompts to draw."})
    seed: int = field(default=0, metadata={"help": "Seed of the scenes and of the sampling."})
    batch_size: int = field(default=25, metadata={"help": "Prompts drawn at once."})
    guidance_scale: float = field(default=2.0, metadata={"help": "Classifier-free guidance, base and adapter alike."})
    temperature: float = field(default=0.7, metadata={"help": "Sampling temperature, base and adapter alike."})
    json: str | None = field(default=None, metadata={"help": "File to write the scores to."})
    card: bool = field(default=False, metadata={"help": "Write them into the card of --adapter, which is a folder."})


@dataclass
class Contender:
    """A model with the processor of its own placeholder count."""

    name: str
    model: torch.nn.Module
    processor: ProcessorMixin


def twin_of(model: torch.nn.Module) -> torch.nn.Module:
    """A copy that shares every weight: an adapter on it leaves the model itself bare."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def contenders(base: str, adapter: str | None, device: str = "cpu") -> list[Contender]:
    """The bare base, as transformers loads it, and the adapter on the same weights."""
    model = AutoModelForImageTextToText.from_pretrained(base).eval().to(device)
    dense = Contender("base", model, AutoProcessor.from_pretrained(base))
    if adapter is None:
        return [dense]
    compact = UniCompressModel.from_pretrained(twin_of(model), adapter).eval()
    return [dense, Contender("adapter", compact, AutoProcessor.from_pretrained(adapter))]


def reading_inputs(processor: ProcessorMixin, images: list[Image.Image], questions: list[str]) -> dict:
    """A batch of questions, each about its image."""
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for question in questions
    ]
    return processor(text=texts, images=images, padding=True, return_tensors="pt")


def grid_of(contender: Contender) -> Grid:
    """The grid of the codes of what it draws."""
    calls = calls_of(contender.model)
    return calls.grid(contender.model, drawing_inputs(contender.processor, ["a red 3"], calls))


@torch.no_grad()
def answer(contender: Contender, images: list[Image.Image], questions: list[str], max_new_tokens: int = 16) -> list[str]:
    """Answers, greedily."""
    inputs = reading_inputs(contender.processor, images, questions).to(contender.model.device)
    output = contender.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    texts = contender.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


@torch.no_grad()
def draw(contender: Contender, prompts: list[str], **sampling) -> tuple[list[Image.Image], float]:
    """Drawings, and the seconds of a prompt's way to pixels: language model, decompressor, image decoder."""
    model = contender.model
    calls = calls_of(model)
    inputs = drawing_inputs(contender.processor, prompts, calls).to(model.device)
    start = time.perf_counter()
    tokens = calls.draw(model, inputs, **sampling)
    pixels = calls.pixels(model, tokens, calls.grid(model, inputs))
    if pixels.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return to_images(contender.processor, pixels), seconds


def read_tokens(processor: ProcessorMixin) -> int:
    """What the language model reads of a scene: its placeholders, and the ends of its rows where they are words."""
    tokenizer = processor.tokenizer
    block = processor.replace_image_token({"image_sizes": [[IMAGE_SIZE, IMAGE_SIZE]]}, 0)
    of_image = {tokenizer.convert_tokens_to_ids(processor.image_token), getattr(tokenizer, "eol_token_id", None)}
    return sum(token in of_image for token in tokenizer(block)["input_ids"])


def drawn_steps(contender: Contender) -> int:
    """Steps of the language model for a scene."""
    grid = grid_of(contender)
    if not isinstance(contender.model, UniCompressModel):
        return family_of(contender.model).dense_placeholders(grid)
    return contender.model.active_peft_config.num_image_tokens(grid) - 1  # the separator is known


def score_reading(contender: Contender, scenes: list[Scene], seed: int) -> dict[str, float]:
    """Exact match by kind of question, and their mean."""
    scores = {}
    for kind in QUESTION_KINDS:
        rng = np.random.default_rng(seed)
        asked = [(scene, pair) for scene in scenes if (pair := scene.question(kind, rng))]
        right = 0
        for first in tqdm(range(0, len(asked), 50), desc=f"{contender.name} reads: {kind}", leave=False):
            rows = asked[first : first + 50]
            answers = answer(contender, [scene.image(SPLIT) for scene, _ in rows], [question for _, (question, _) in rows])
            right += sum(told == truth for told, (_, (_, truth)) in zip(answers, rows, strict=True))
        scores[kind] = right / len(asked)
    return {"mean": sum(scores.values()) / len(scores), **scores}


def score_drawing(pair: list[Contender], scenes: list[Scene], args: EvaluateArguments) -> dict[str, dict[str, float]]:
    """Cells and scenes drawn right, and seconds an image: each batch by the base, then by the adapter."""
    rng = np.random.default_rng(args.seed)
    prompts = [scene.shuffled_caption(rng) for scene in scenes]
    sampling = {"do_sample": True, "temperature": args.temperature, "guidance_scale": args.guidance_scale}
    totals = {contender.name: {"cells": 0.0, "scenes": 0.0, "seconds": 0.0} for contender in pair}
    torch.manual_seed(args.seed)
    for contender in pair:
        draw(contender, prompts[: args.batch_size], **sampling)  # warm-up
    for first in tqdm(range(0, len(scenes), args.batch_size), desc="draw, in turn"):
        batch = slice(first, first + args.batch_size)
        for contender in pair:
            images, seconds = draw(contender, prompts[batch], **sampling)
            drawn = judge(np.stack([np.asarray(image) for image in images]))
            right = [right_cells(asked, seen) for asked, seen in zip(scenes[batch], drawn, strict=True)]
            total = totals[contender.name]
            total["cells"] += sum(right) / 4
            total["scenes"] += sum(cells == 4 for cells in right)
            total["seconds"] += seconds
    return {name: {key: value / len(scenes) for key, value in total.items()} for name, total in totals.items()}


@torch.no_grad()
def dense_nats(contender: Contender, images: list[Image.Image], prompts: list[str]) -> float:
    """Negative log-likelihood of the images' dense codes under the base, summed over the batch."""
    base, family, (rows, columns) = contender.model, family_of(contender.model), grid_of(contender)
    inputs = drawing_inputs(contender.processor, prompts, calls_of(base)).to(base.device)
    pixels = contender.processor.image_processor(images, return_tensors="pt")["pixel_values"].to(base.device)
    codes = family.dense_codes(pixels)  # (B, T)
    prompt = base.get_input_embeddings()(inputs["input_ids"])
    drawn = family.embed_codes(codes)  # (B, T, D)
    before_code = torch.ones(rows * columns, dtype=torch.bool)
    if family.row_ends:  # what ends a row is given: it stands behind each, and is not scored
        ends = family.row_end.expand(len(codes), rows, 1, -1)
        drawn = torch.cat([drawn.unflatten(1, (rows, columns)), ends], 2).flatten(1, 2)  # (B, H * (W + 1), D)
        before_code = (torch.arange(rows * (columns + 1)) + 1) % (columns + 1) != 0
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, drawn.shape[1] - 1), value=1)
    hidden = family.language_model(inputs_embeds=torch.cat([prompt, drawn[:, :-1]], 1), attention_mask=mask)
    before = hidden.last_hidden_state[:, prompt.shape[1] - 1 :][:, before_code]  # (B, T, D)
    logits = family.code_logits(before)  # (B, T, K)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), codes.flatten(), reduction="sum").item()


@torch.no_grad()
def compact_nats(contender: Contender, images: list[Image.Image], prompts: list[str]) -> float:
    """The adapter's: compact codes from the language model, and dense codes given them from the decompressor."""
    model = contender.model
    collator = UniCompressCollator(contender.processor, model.active_peft_config, caption_dropout=0.0)
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
    nats = -(output.log_probs * batch["drawn_mask"][:, 1:]).sum().item()
    drawing = model.drawing
    if not drawing.module.in_loop:
        codes = drawing.compress(batch["drawn_pixel_values"])
        logits = drawing.reconstruction_logits(codes, drawing.entries(codes.cells.squeeze(2)), drawing.entries(codes.globals))
        nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), codes.dense.flatten(), reduction="sum").item()
    return nats


@torch.no_grad()
def score_reconstruction(contender: Contender, scenes: list[Scene]) -> dict[str, float]:
    """Real scenes through the tokenizer alone: to codes (the adapter: to compact codes and back), then to pixels."""
    model = contender.model
    drawing = model.drawing if isinstance(model, UniCompressModel) else None
    family, calls, grid = family_of(base_of(model)), calls_of(model), grid_of(contender)
    right, error, count = 0, 0.0, 0
    for first in range(0, len(scenes), 50):
        rows = scenes[first : first + 50]
        truth = np.stack([scene.render(SPLIT) for scene in rows])
        pixels = contender.processor.image_processor(list(truth), return_tensors="pt")["pixel_values"].to(model.device)
        if drawing is None:
            tokens = family.dense_codes(pixels)
        else:
            codes = drawing.compress(pixels)
            tokens = drawing.expand(codes.globals, codes.cells, grid, lambda logits: logits.argmax(-1))
        images = to_images(contender.processor, calls.pixels(model, family.to_tokens(tokens, grid), grid))
        restored = np.stack([np.asarray(image) for image in images])
        right += sum(right_cells(a, b) for a, b in zip(rows, judge(restored), strict=True))
        error += float(np.square((restored.astype(np.float64) - truth) / 255).mean((1, 2, 3)).sum())
        count += len(rows)
    return {"cells": right / (4 * count), "psnr": -10 * math.log10(error / count)}


def main(args: EvaluateArguments) -> dict:
    # Janus warns at every answer that max_new_tokens wins over a max_length that nobody set (its default, 20)
    transformers.logging.set_verbosity_error()
    rng = np.random.default_rng(args.seed)
    scenes = [random_scene(rng, SPLIT) for _ in range(args.scenes)]
    pair = contenders(args.base, args.adapter)
    reading = {contender.name: score_reading(contender, scenes, args.seed) for contender in pair}
    drawing = score_drawing(pair, scenes, args)
    nats, tokens, reconstruction = {}, {}, {}
    for contender in pair:
        measure = dense_nats if contender.name == "base" else compact_nats
        total = 0.0
        for first in tqdm(range(0, len(scenes), 50), desc=f"{contender.name}: nats", leave=False):
            rows = scenes[first : first + 50]
            total += measure(contender, [scene.image(SPLIT) for scene in rows], [scene.caption() for scene in rows])
        nats[contender.name] = total / len(scenes)
        reconstruction[contender.name] = score_reconstruction(contender, scenes)
        tokens[contender.name] = read_tokens(contender.processor)
    drawn = {contender.name: drawn_steps(contender) for contender in pair}
    scores = {
        "dataset": f"digit scenes of held-out scans, n = {args.scenes}, seed {args.seed}",
        "reading": {name: score["mean"] for name, score in reading.items()},
        "drawing": {name: score["cells"] for name, score in drawing.items()},
        "tokens": {"read": tokens, "drawn": drawn},
        "seconds_per_image": {name: score["seconds"] for name, score in drawing.items()},
        "nats_per_image": nats,
        "whole_scenes": {name: score["scenes"] for name, score in drawing.items()},
        "reading_by_kind": reading,
        "reconstruction": reconstruction,
        "settings": vars(args),
        "environment": {
            "device": f"{torch.get_num_threads()} CPU threads, {platform.processor() or platform.machine()}",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "uc_adapters": uc_adapters.__version__,
        },
    }
    text = json.dumps(scores, indent=2)
    print(text)
    if args.json:
        Path(args.json).write_text(text + "\n")
    if args.card:
        update_card(Path(args.adapter), CardFacts(evaluation=scores))
    return scores


if __name__ == "__main__":
    main(*TrlParser(EvaluateArguments).parse_args_and_config())
