"""Judges contenders by labelled real pictures: what they draw, what their tokenizer gives back, and what they say they see."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property

import numpy as np
import torch
from datasets import Dataset
from PIL import Image, ImageOps
from reporting.intervals import Estimate, mean, share
from rows.conversations import decoded
from rows.turns import CAPTION_REQUEST
from scoring.contenders import Contender
from scoring.names import likeness, load_encoder, named
from scoring.picture_features import PictureFeatures, perceptual_distance
from scoring.real_pictures import RealPictures, frechet_distance, to_tensor
from scoring.reconstruction import restored
from scoring.vqa import Question, answer_questions
from torchmetrics.image import PeakSignalNoiseRatio
from tqdm.auto import tqdm

FEW = 5  # a label with more values: is the right one among the five nearest, and how alike is a wrong name?


class PictureJudge:
    """Judges what contenders draw and read.

    Args:
        pictures: The real pictures, rows of `conversations` that are a caption and its image, with a column for each label.
        own: For each scored caption, the row of its real picture.
        labels: The names of the columns whose values are judged.
        batch_size: Pictures in a batch.
        device: The device of the judge's models.

    Raises:
        SystemExit: The judge's packages are not installed.
    """

    def __init__(self, pictures: Dataset, own: Sequence[int], labels: Sequence[str], batch_size: int, device: str):
        self.network = PictureFeatures().to(device)
        self.encoder = load_encoder(device)
        self.pictures, self.own, self.batch_size = pictures, list(own), batch_size
        self.labels: dict[str, list[str]] = {label: pictures[label] for label in labels}
        self.many = {label for label, values in self.labels.items() if len(set(values)) > FEW}
        self.size: tuple[int, int] | None = None
        self._features: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._ranks: dict[str, dict[str, list[torch.Tensor]]] = defaultdict(lambda: defaultdict(list))

    @cached_property
    def real(self) -> RealPictures:
        """The real pictures, as sharp as the drawings are."""
        return RealPictures(
            self._batches(range(len(self.pictures)), "features of the real pictures"), self.labels, self.network
        )

    def _batches(self, indices: Sequence[int], what: str) -> Iterator[list[Image.Image]]:
        for first in tqdm(range(0, len(indices), self.batch_size), desc=what, leave=False):
            rows = self.pictures.select(indices[first : first + self.batch_size])
            yield [ImageOps.fit(decoded(row)["images"][0], self.size, Image.Resampling.BICUBIC) for row in rows]

    def update(self, name: str, drawn: list[Image.Image], captions: list[int]) -> None:
        """Adds a batch of a contender's drawings: of the scored captions with these numbers."""
        self.size = drawn[0].size
        features = self.real.look(drawn).features
        alike = self.real.alike(features)
        self._features[name].append(features)
        for label in self.labels:
            self._ranks[name][label].append(self.real.ranks(label, alike, [self.own[caption] for caption in captions]))

    def drawings(self, name: str) -> dict[str, dict | float]:
        """The scores of what a contender drew: of every caption equally often, in their order."""
        scores: dict[str, dict | float] = {}
        for label, ranks in self._ranks[name].items():
            ranks = torch.cat(ranks).reshape(-1, len(self.own)).numpy()  # (drawings of each caption, captions)
            scores[f"{label}_nearest"] = asdict(_by_caption(ranks < 1))
            if label in self.many:
                scores[f"{label}_nearest_5"] = asdict(_by_caption(ranks < 5))
        scores["frechet_distance"] = frechet_distance(self.real.features, torch.cat(self._features[name]))
        return scores

    def reconstructions(self, contender: Contender) -> dict[str, dict | float]:
        """The scores of the scored captions' real pictures, after the contender's tokenizer alone."""
        psnr = PeakSignalNoiseRatio(data_range=255.0)
        distances, nearest = [], []
        for real in self._batches(self.own, f"{contender.name}: reconstruction"):
            given_back = restored(contender, real)
            psnr.update(to_tensor(given_back).float(), to_tensor(real).float())
            one, other = self.real.look(given_back), self.real.look(real)
            distances.append(perceptual_distance(one, other))
            nearest.append(self.real.alike(one.features).argmax(1))
        return {
            "psnr": psnr.compute().item(),
            "perceptual_distance": asdict(mean(torch.cat(distances).double().numpy())),
            "own_nearest": asdict(share((torch.cat(nearest) == torch.tensor(self.own)).tolist())),
        }

    def descriptions(self, contender: Contender, max_new_tokens: int) -> dict[str, dict]:
        """The scores of the contender's greedy answers to "Describe the image." about the scored captions' real pictures."""
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": CAPTION_REQUEST}]}
        questions = [Question(own, 1, [turn], []) for own in self.own]
        answers = answer_questions(contender, self.pictures, questions, self.batch_size, max_new_tokens)
        scores = {}
        for label, of_pictures in self.labels.items():
            names, truths = sorted(set(of_pictures)), [of_pictures[own] for own in self.own]
            told = [named(answer, names) for answer in answers]
            scores[f"{label}_named"] = asdict(share([name == truth for name, truth in zip(told, truths, strict=True)]))
            if label in self.many:
                said = [name or answer for name, answer in zip(told, answers, strict=True)]
                scores[f"{label}_likeness"] = asdict(mean(likeness(self.encoder, said, truths)))
        return scores


def _by_caption(right: np.ndarray) -> Estimate:
    """The share of drawings that are right, (drawings of each caption, captions). Each caption is a trial."""
    if len(right) == 1 or right.all() or not right.any():  # where all are alike, a bootstrap would have no interval
        return share(right[0])
    return mean(right.mean(0))
