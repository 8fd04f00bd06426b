"""Reads prompt files in GenEval's format, and draws them into the folders that GenEval's own evaluator reads."""

from __future__ import annotations

import json
from pathlib import Path

from scoring.contenders import Contender, draw_in_turn


def read_prompts(file: str) -> list[dict]:
    """Reads the lines of a GenEval prompt file: {"prompt", "tag", "include": [{"class", "count", ...}], "exclude": [...]}.

    Raises:
        SystemExit: There is no such file, it is not UTF-8 or empty, or a line has another form; the message names the line.
    """
    path = Path(file)
    if not path.is_file():
        raise SystemExit(f"--prompts {file} is not a file; expected JSONL in GenEval's format.")
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SystemExit(f"--prompts {file} is not UTF-8: {error}; expected JSONL in GenEval's format.") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise SystemExit(f"--prompts {file} is empty; expected a line of JSON for each prompt, in GenEval's format.")
    return [_prompt(line, f"--prompts {file}, line {number}") for number, line in lines]


def _prompt(line: str, where: str) -> dict:
    try:
        prompt = json.loads(line)
    except json.JSONDecodeError as error:
        raise SystemExit(f"{where} is not JSON: {error}; expected an object with prompt, tag and include.") from error
    if not isinstance(prompt, dict):
        raise SystemExit(f"{where} is a {type(prompt).__name__}; expected an object with prompt, tag and include.")
    for name in ("prompt", "tag"):
        if not isinstance(prompt.get(name), str) or not prompt[name].strip():
            raise SystemExit(f"{where} has {name} = {prompt.get(name)!r}; expected a text that is not empty.")
    for name in ("include", "exclude"):
        objects = prompt.get(name, [])
        if not isinstance(objects, list) or not all(map(_is_object, objects)) or (name == "include" and not objects):
            raise SystemExit(
                f"{where} has {name} = {objects!r}; expected a list of "
                '{"class": "dog", "count": 1}, with "color" and "position": ["left of", 0] where they matter.'
            )
    return prompt


def _is_object(thing: object) -> bool:
    return isinstance(thing, dict) and isinstance(thing.get("class"), str) and type(thing.get("count")) is int


def free_folder(output_dir: str) -> Path:
    """The folder to draw into, which must be empty or new.

    Raises:
        SystemExit: It has something in it. GenEval would score drawings of two runs as one.
    """
    folder = Path(output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SystemExit(f"--output_dir {output_dir} exists and is not an empty folder; expected a new one.")
    return folder


def draw_prompts(
    pair: list[Contender], prompts: list[dict], samples: int, folder: Path, seed: int, batch_size: int, **sampling
) -> dict[str, float]:
    """Draws each prompt `samples` times with each contender, in turn, from the same seeds.

    FOLDER/base/00000/metadata.jsonl is the first prompt's line, FOLDER/base/00000/samples/0000.png its first drawing.

    Returns:
        Each contender's seconds per image.
    """
    for contender in pair:
        for index, prompt in enumerate(prompts):
            target = folder / contender.name / f"{index:05}"
            (target / "samples").mkdir(parents=True)
            (target / "metadata.jsonl").write_text(json.dumps(prompt) + "\n")
    asked = [(index, sample) for index in range(len(prompts)) for sample in range(samples)]
    captions = [prompts[index]["prompt"] for index, _ in asked]
    seconds = dict.fromkeys((contender.name for contender in pair), 0.0)
    for batch, contender, drawn, taken in draw_in_turn(pair, captions, seed, batch_size, **sampling):
        seconds[contender.name] += taken
        for (index, sample), image in zip(asked[batch], drawn, strict=True):
            image.save(folder / contender.name / f"{index:05}" / "samples" / f"{sample:04}.png")
    return {name: total / len(asked) for name, total in seconds.items()}
