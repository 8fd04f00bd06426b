"""Writes scenes of held-out digits as a folder of images with a metadata.jsonl: a dataset to try the evaluators on.

    python recipes/make_scenes_folder.py --output_dir work/digit-questions --scenes 40 --seed 1
    python recipes/make_scenes_folder.py --output_dir work/digit-captions --scenes 300 --captions true

Needs: pip install -c constraints.txt -e ".[recipes]".
Columns are image + question + answer, or image + text. lmms-eval's task `digit_scenes` asks the questions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tiny_world.digits import QUESTION_KINDS, random_scene
from trl import TrlParser


@dataclass
class ScenesFolderArguments:
    """What to write, and where."""

    output_dir: str = field(default="work/digit-questions", metadata={"help": "The new folder to write."})
    scenes: int = field(default=100, metadata={"help": "Scenes, with a question of each kind that fits them."})
    captions: bool = field(default=False, metadata={"help": "Write captions in place of questions."})
    seed: int = field(default=0, metadata={"help": "Seed of scenes and questions."})


def main(args: ScenesFolderArguments) -> None:
    folder = Path(args.output_dir)
    if folder.exists():  # images already there would become rows without a text
        raise SystemExit(f"--output_dir {folder} exists; expected a new folder. Name another, or remove it.")
    folder.mkdir(parents=True)
    rng, lines = np.random.default_rng(args.seed), []
    for index in range(args.scenes):
        scene = random_scene(rng, "held-out")
        if args.captions:
            texts = {"caption": {"text": scene.caption()}}
        else:
            pairs = {kind: scene.question(kind, rng) for kind in QUESTION_KINDS}
            texts = {kind: dict(zip(("question", "answer"), pair, strict=True)) for kind, pair in pairs.items() if pair}
        for kind, columns in texts.items():
            name = f"{index:05}-{kind}.png"
            scene.image("held-out").save(folder / name)
            lines.append(json.dumps({"file_name": name, **columns}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(*TrlParser(ScenesFolderArguments).parse_args_and_config())
