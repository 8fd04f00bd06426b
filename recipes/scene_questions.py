"""Questions about scenes of held-out digits, as a folder of images with a metadata.jsonl: image + question + answer.

    python recipes/scene_questions.py --output_dir work/digit-questions --scenes 100 --seed 1

Needs: pip install -c constraints.txt -e ".[recipes]".
It is what lmms-eval's task `digit_scenes` asks, and a dataset for `evaluate_dataset.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from digits import QUESTION_KINDS, random_scene
from trl import TrlParser


@dataclass
class SceneQuestionsArguments:
    """What to write."""

    output_dir: str = field(
        default="work/digit-questions", metadata={"help": "The folder; images of the same names are replaced."}
    )
    scenes: int = field(default=100, metadata={"help": "Scenes, with a question of each kind that they settle."})
    seed: int = field(default=0, metadata={"help": "Of scenes and questions."})


def main(args: SceneQuestionsArguments) -> None:
    rng, folder = np.random.default_rng(args.seed), Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(args.scenes):
        scene = random_scene(rng, "held-out")
        for kind in QUESTION_KINDS:
            if pair := scene.question(kind, rng):
                name = f"{index:05}-{kind}.png"
                scene.image("held-out").save(folder / name)
                lines.append(json.dumps({"file_name": name, "question": pair[0], "answer": pair[1]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(*TrlParser(SceneQuestionsArguments).parse_args_and_config())
