"""Scores on scenes of held-out digits: reading, drawing, NLL, reconstruction, and feature distances."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from reporting.intervals import Estimate, mean_share, share
from scoring.contenders import Contender, answer, draw_in_turn
from scoring.digit_features import digit_features, to_tensor
from scoring.likelihood import image_nats
from scoring.reconstruction import restored
from tiny_world.digits import QUESTION_KINDS, Scene, judge, load_scans, right_by_aspect, right_quarters
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm.auto import tqdm

SPLIT = "held-out"
_BATCH = 50  # batch size of everything that is not timed


@dataclass
class ReadingScore:
    """Which answers are right: equal to the true answer, word for word.

    Args:
        right: For each kind of question, (N,): 1 right, 0 wrong, nan if the scene has no single answer to that kind.
    """

    right: dict[str, np.ndarray]

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """The mean share of right answers over the kinds, then the share of each kind."""
        kinds = {kind: share(right[~np.isnan(right)]) for kind, right in self.right.items()}
        return {"mean": mean_share(list(kinds.values())), **kinds}

    @cached_property
    def by_scene(self) -> np.ndarray:
        """What each scene contributes to the mean over kinds, (N,). The mean of these values is that mean."""
        shares = [np.nan_to_num(right) / np.mean(~np.isnan(right)) for right in self.right.values()]
        return np.mean(shares, 0)


@dataclass
class DrawingScore:
    """Which parts of each drawn scene are right.

    Args:
        images: The drawings, (N, 64, 64, 3) uint8.
        right: `digits.right_by_aspect` of each scene.
        seconds: Seconds per image, from prompt to pixels.
    """

    images: np.ndarray
    right: list[dict[str, list[bool]]]
    seconds: float

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """For each aspect, the share of right quarters or scenes, among those that it covers."""
        by_aspect = {aspect: [x for of_scene in self.right for x in of_scene[aspect]] for aspect in self.right[0]}
        return {
            aspect: share(right) for aspect, right in by_aspect.items() if right
        }  # if all quarters are filled, none can be rightly empty

    @cached_property
    def by_scene(self) -> np.ndarray:
        """The share of right quarters of each scene, (N,)."""
        return np.array([np.mean(of_scene["quarters"]) for of_scene in self.right])


def render(scenes: list[Scene]) -> np.ndarray:
    """The real scenes, (N, 64, 64, 3) uint8."""
    return np.stack([scene.render(SPLIT) for scene in scenes])


def drawing_prompts(scenes: list[Scene], seed: int) -> list[str]:
    """The prompt for each scene: its caption, with the quarters in random order."""
    rng = np.random.default_rng(seed)
    return [scene.shuffled_caption(rng) for scene in scenes]


def with_other_scans(scenes: list[Scene], seed: int) -> list[Scene]:
    """The same digits and colours, shown by random held-out scans. No perfect model could come nearer to the scenes."""
    rng, (_, digits) = np.random.default_rng(seed), load_scans(SPLIT)
    shown = [np.flatnonzero(digits == digit) for digit in range(10)]
    return [
        Scene(tuple(quarter and replace(quarter, scan=int(rng.choice(shown[quarter.digit]))) for quarter in scene.quarters))
        for scene in scenes
    ]


def score_reading(contender: Contender, scenes: list[Scene], seed: int) -> ReadingScore:
    """Asks one question of each kind about every scene that has a single answer to it."""
    scores = {}
    for kind in QUESTION_KINDS:
        rng = np.random.default_rng(seed)
        asked = [(row, pair) for row, scene in enumerate(scenes) if (pair := scene.question(kind, rng))]
        right = np.full(len(scenes), np.nan)
        for first in tqdm(range(0, len(asked), _BATCH), desc=f"{contender.name} reads: {kind}", leave=False):
            rows = asked[first : first + _BATCH]
            images = [scenes[row].image(SPLIT) for row, _ in rows]
            answers = answer(contender, images, [question for _, (question, _) in rows])
            for reply, (row, (_, truth)) in zip(answers, rows, strict=True):
                right[row] = reply == truth
        if asked:  # with few scenes, no scene may have a digit only once, and so no question of its colour
            scores[kind] = right
    return ReadingScore(scores)


def score_drawing(
    pair: list[Contender], scenes: list[Scene], seed: int, batch_size: int, **sampling
) -> dict[str, DrawingScore]:
    """Draws, times and judges every scene: each batch by all contenders in turn, from one seed.

    Args:
        pair: The contenders.
        scenes: The scenes to draw.
        seed: Seed of the prompts' wording and of the sampling.
        batch_size: Prompts drawn at once.
        **sampling: Arguments of `generate`.
    """
    drawn = {contender.name: [] for contender in pair}
    total = dict.fromkeys(drawn, 0.0)
    for _, contender, images, seconds in draw_in_turn(pair, drawing_prompts(scenes, seed), seed, batch_size, **sampling):
        drawn[contender.name] += images
        total[contender.name] += seconds
    return {name: judge_drawings(scenes, np.stack(drawn[name]), total[name] / len(scenes)) for name in drawn}


def judge_drawings(scenes: list[Scene], images: np.ndarray, seconds: float) -> DrawingScore:
    """Judges drawings (N, 64, 64, 3) uint8 of `scenes`; each took `seconds`."""
    right = [right_by_aspect(asked, seen) for asked, seen in zip(scenes, judge(images), strict=True)]
    return DrawingScore(images, right, seconds)


def score_nats(contender: Contender, scenes: list[Scene]) -> np.ndarray:
    """The NLL of each real scene given its caption, in nats, (N,)."""
    batches = range(0, len(scenes), _BATCH)
    nats = []
    for first in tqdm(batches, desc=f"{contender.name}: nats", leave=False):
        rows = scenes[first : first + _BATCH]
        nats.append(image_nats(contender, [scene.image(SPLIT) for scene in rows], [scene.caption() for scene in rows]))
    return torch.cat(nats).double().cpu().numpy()


@torch.no_grad()
def score_reconstruction(contender: Contender, scenes: list[Scene]) -> dict[str, float]:
    """Scores real scenes after the tokenizer alone: to codes (with an adapter: to compact codes and back), then to pixels.

    Returns:
        "quarters": the share of quarters that the judge still reads; "psnr" in dB, of the squared error of all images
        together; "ssim"; "feature_distance" of the restored scenes from the real ones.
    """
    images = []
    for first in tqdm(range(0, len(scenes), _BATCH), desc=f"{contender.name}: reconstruction", leave=False):
        images += restored(contender, list(render(scenes[first : first + _BATCH])))
    given_back, real = np.stack(images), render(scenes)
    right = sum(right_quarters(asked, seen) for asked, seen in zip(scenes, judge(given_back), strict=True))
    psnr, ssim = PeakSignalNoiseRatio(data_range=255.0), StructuralSimilarityIndexMeasure(data_range=255.0)
    for first in range(0, len(scenes), _BATCH):
        images = [to_tensor(x[first : first + _BATCH]).float() for x in (given_back, real)]
        psnr.update(*images)
        ssim.update(*images)
    return {
        "quarters": right / (4 * len(scenes)),
        "psnr": psnr.compute().item(),
        "ssim": ssim.compute().item(),
        "feature_distance": feature_distance(real, given_back),
    }


@torch.no_grad()
def feature_distance(real: np.ndarray, images: np.ndarray) -> float:
    """The Fréchet distance of `digit_features` between two sets of at least two images, (N, 64, 64, 3) uint8 each."""
    metric = FrechetInceptionDistance(feature=digit_features())
    metric.update(to_tensor(real), real=True)
    metric.update(to_tensor(images), real=False)
    return metric.compute().item()
