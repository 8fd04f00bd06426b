"""Scenes of digits as a dataset in TRL's conversational vision format: user images are read, assistant images drawn."""

from __future__ import annotations

import numpy as np
from datasets import Dataset
from tiny_world.digits import DESCRIBE, QUESTION_KINDS, random_scene


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def scene_row(seed: int, split: str) -> dict:
    """One row. An even seed is read (a conversation with every kind of question), an odd seed is drawn."""
    rng = np.random.default_rng(seed)
    scene = random_scene(rng, split)
    image = scene.image(split)
    if seed % 2:
        prompt, drawn = {"role": "user", "content": [text_part(scene.shuffled_caption(rng))]}, {"type": "image"}
        return {"messages": [prompt, {"role": "assistant", "content": [drawn]}], "images": [image]}
    pairs = [pair for kind in QUESTION_KINDS * 2 if (pair := scene.question(kind, rng))]
    pairs = [pairs[int(i)] for i in rng.permutation(len(pairs))] + [(DESCRIBE, scene.caption())]
    messages = []
    for question, answer in pairs:
        messages.append({"role": "user", "content": [text_part(question)]})
        messages.append({"role": "assistant", "content": [text_part(answer)]})
    messages[0]["content"].insert(0, {"type": "image"})
    return {"messages": messages, "images": [image]}


def scenes_dataset(rows: int, seed: int, split: str = "train", draws: bool = True) -> Dataset:
    """A dataset of `rows` scenes, which are rendered when they are read. Without `draws`, all of them are read."""
    first, step = seed * 10_000_000, 1 if draws else 2

    def render(batch: dict) -> dict:
        made = [scene_row(row, split) for row in batch["scene"]]
        return {"messages": [row["messages"] for row in made], "images": [row["images"] for row in made]}

    return Dataset.from_dict({"scene": list(range(first, first + rows * step, step))}).with_transform(render)
