"""Tells how far the judge of `evaluate_dataset.py --labels` can be trusted on your pictures, before it judges any drawing.

    python recipes/validate_judge.py --dataset pictures --splits train test --labels concept style --json validation.json

Needs: pip install -c constraints.txt -e ".[recipes,judge]". Some minutes for 1,000 pictures on two CPU cores.
Half of the real pictures, chosen by --seed, is judged in place of drawings: as it is, with the captions of other pictures,
blurred, and with noise. A judge that works finds the label of a real picture among the others, is at chance with other
captions, and scores heavier corruptions lower. Prints a markdown table; docs/figures/judge.md has an example and explains it.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from reporting.environment import check_device, check_output, environment, in_words, make_current
from reporting.intervals import estimate, mean, share
from rows.captions import caption_of, labelled_pictures
from rows.conversations import DatasetError, decoded
from scoring.names import load_encoder, names_right
from scoring.picture_features import PACKAGES, PictureFeatures, perceptual_distance
from scoring.real_pictures import GIVEN_OTHERS, RealPictures, frechet_distance
from scoring.score_names import label_of, score_text
from tqdm.auto import tqdm
from trl import TrlParser

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

SIZE = 64  # of the pictures that are compared, as the tiny bases draw them
AS_IT_IS, OTHER_CAPTION = "as it is", "with another's caption"
BLURS = (1, 2, 4)  # radius in pixels
NOISES = (20, 40, 80)  # standard deviation, where 255 is white


@dataclass
class ValidateJudgeArguments:
    """What the judge is tried on."""

    dataset: str = field(metadata={"help": "Hub id, folder or file of captions with images, and of their labels."})
    labels: list[str] = field(metadata={"help": "Columns that say what is in a picture, such as concept style."})
    splits: list[str] = field(default_factory=lambda: ["train"], metadata={"help": "Splits of the dataset."})
    seed: int = field(default=0, metadata={"help": "Seed of the half that is judged, of its other captions and of the noise."})
    batch_size: int = field(default=32, metadata={"help": "Pictures in a batch."})
    device: str = field(default="cpu", metadata={"help": "Torch device of the judge."})
    json: str | None = field(default=None, metadata={"help": "File to write the scores to."})


def main(args: ValidateJudgeArguments) -> dict:
    check(args)
    make_current(args.device)
    network, encoder = PictureFeatures().to(args.device), load_encoder(args.device)
    rows = labelled_pictures(args.dataset, args.splits, args.labels, {})
    if len(rows) < 4:
        raise DatasetError(
            f"{args.dataset} has {len(rows)} captions with an image; expected four or more, to judge half of them."
        )
    rng = np.random.default_rng(args.seed)
    judged = rng.permutation(len(rows))[: len(rows) // 2].tolist()
    others = rng.permutation(judged).tolist()
    images = [ImageOps.fit(decoded(row)["images"][0], (SIZE, SIZE), Image.Resampling.BICUBIC) for row in rows]
    labels = {label: rows[label] for label in args.labels}

    start = time.perf_counter()
    batches = range(0, len(images), args.batch_size)
    real = RealPictures(
        (images[first : first + args.batch_size] for first in tqdm(batches, desc="real pictures")), labels, network
    )
    seconds = {"features": (time.perf_counter() - start) / len(images)}
    pictures = judge_pictures(real, images, judged, others, args.batch_size, rng)
    captions = [caption_of(rows[index]) for index in judged]
    start = time.perf_counter()
    names = {
        case: judge_names(captions, labels, owners, encoder) for case, owners in ((AS_IT_IS, judged), (OTHER_CAPTION, others))
    }
    seconds["names"] = (time.perf_counter() - start) / (2 * len(judged))
    scores = {
        "dataset": args.dataset,
        "real": len(rows),
        "n": len(judged),
        "pictures": pictures,
        "names": names,
        "seconds": seconds,
        "settings": vars(args),
        "environment": environment(args.device, PACKAGES),
    }
    print(markdown(scores))
    if args.json:
        Path(args.json).write_text(json.dumps(scores, indent=2) + "\n")
    return scores


def check(args: ValidateJudgeArguments) -> None:
    """Exits on arguments that would fail after minutes."""
    if args.batch_size < 1:
        raise SystemExit(f"--batch_size {args.batch_size}: expected 1 or more.")
    check_device(args.device)
    check_output("json", args.json)


def corruptions(rng: np.random.Generator) -> dict[str, Callable[[Image.Image], Image.Image]]:
    """What is done to the pictures, each kind from light to heavy."""

    def noisy(image: Image.Image, deviation: int) -> Image.Image:
        pixels = np.asarray(image) + rng.normal(0, deviation, (*image.size[::-1], 3))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    blurs = {f"blur, {radius} px": partial(Image.Image.filter, filter=ImageFilter.GaussianBlur(radius)) for radius in BLURS}
    return blurs | {f"noise, {deviation} of 255": partial(noisy, deviation=deviation) for deviation in NOISES}


def judge_pictures(
    real: RealPictures,
    images: list[Image.Image],
    judged: list[int],
    others: list[int],
    batch_size: int,
    rng: np.random.Generator,
) -> dict[str, dict]:
    """The scores of the judged pictures by what was done to them, each by the name that evaluate_dataset.py has for it.

    Args:
        real: All real pictures.
        images: The same, as images.
        judged: The numbers of the real pictures to judge. The Fréchet distance is that from all the others.
        others: For each, the real picture whose caption it gets when it gets another's.
        batch_size: Pictures in a batch.
        rng: The source of the noise.
    """
    rest = sorted(set(range(len(images))) - set(judged))
    features, distances = defaultdict(list), defaultdict(list)
    for first in tqdm(range(0, len(judged), batch_size), desc="corrupted pictures"):
        batch = [images[index] for index in judged[first : first + batch_size]]
        seen = real.look(batch)
        for name, corrupt in corruptions(rng).items():
            corrupted = real.look([corrupt(image) for image in batch])
            features[name].append(corrupted.features)
            distances[name].append(perceptual_distance(corrupted, seen))

    plain = real.features[judged]
    alike = real.alike(plain)
    with_others_captions = nearest(real, alike, others)
    alike[range(len(judged)), judged] = -torch.inf
    among_others = {what: found for what, found in nearest(real, alike, judged).items() if not what.endswith(GIVEN_OTHERS)}
    scores = {
        AS_IT_IS: among_others | {"frechet_distance": frechet_distance(real.features[rest], plain)},
        OTHER_CAPTION: with_others_captions,
    }
    for name, batches in features.items():
        corrupted = torch.cat(batches)
        alike = real.alike(corrupted)
        own = alike.argmax(1).cpu() == torch.tensor(judged)
        scores[name] = nearest(real, alike, judged) | {
            "own_nearest": asdict(share(own.tolist())),
            "perceptual_distance": asdict(mean(torch.cat(distances[name]).cpu().double().numpy())),
            "frechet_distance": frechet_distance(real.features[rest], corrupted),
        }
    return scores


def nearest(real: RealPictures, alike: torch.Tensor, owners: list[int]) -> dict[str, dict[str, float]]:
    """How often the nearest real pictures have the labels of `owners`."""
    return {what: asdict(share(right.tolist())) for what, right in real.right(alike, owners).items()}


def judge_names(
    captions: list[str], labels: dict[str, list[str]], owners: list[int], encoder: SentenceTransformer
) -> dict[str, dict[str, float]]:
    """The scores of captions in place of answers about the pictures of `owners`."""
    scores = {}
    for label, values in labels.items():
        scores |= names_right(label, values, captions, [values[owner] for owner in owners], encoder)
    return {what: asdict(estimate(right)) for what, right in scores.items()}


def markdown(scores: dict) -> str:
    """The table of the scores: a column for what was done to the pictures, a row for each score."""
    cases = list(scores["pictures"])
    found = {case: scores["pictures"][case] | scores["names"].get(case, {}) for case in cases}
    rows = list(dict.fromkeys(what for case in reversed(cases) for what in found[case]))  # the last case has the most scores
    lines = [["", *cases], ["---"] * (1 + len(cases))]
    lines += [[label_of(what), *(score_text(what, found[case].get(what)) for case in cases)] for what in rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    taken = ", ".join(f"{seconds:.3f} s ({what})" for what, seconds in scores["seconds"].items())
    told = f"{scores['n']} of {scores['real']} real pictures; in brackets, 95 % intervals; {taken} a picture"
    return f"{table}\n\n{told}; {in_words(scores['environment'])}"


if __name__ == "__main__":
    main(*TrlParser(ValidateJudgeArguments).parse_args_and_config())
