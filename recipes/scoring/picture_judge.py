"""Judges contenders by labelled real pictures: what they draw, what their tokenizer gives back, and what they say they see."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from datasets import Dataset
from PIL import Image, ImageOps
from rows.captions import caption_of
from rows.conversations import decoded
from rows.turns import CAPTION_REQUEST
from scoring.contenders import Contender
from scoring.likelihood import image_nats
from scoring.names import load_encoder, names_right
from scoring.picture_features import PictureFeatures, perceptual_distance
from scoring.real_pictures import RealPictures, frechet_distance, to_tensor
from scoring.reconstruction import restored
from scoring.vqa import Question, answer_questions
from torchmetrics.image import PeakSignalNoiseRatio
from tqdm.auto import tqdm

Values = dict[str, np.ndarray | float]  # by score: an array (turns, captions), or a number for all captions together


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
        self.size: tuple[int, int] | None = None
        self._features: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._right: dict[str, dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))

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
        self._features[name].append(features)
        owners = [self.own[caption] for caption in captions]
        for what, right in self.real.right(self.real.alike(features), owners).items():
            self._right[name][what].append(right)

    def drawings(self, name: str) -> Values:
        """The scores of what a contender drew: of every caption equally often, in their order."""
        scores: Values = {
            what: np.concatenate(right).reshape(-1, len(self.own))  # (drawings of each caption, captions)
            for what, right in self._right[name].items()
        }
        scores["frechet_distance"] = frechet_distance(self.real.features, torch.cat(self._features[name]))
        return scores

    def reconstructions(self, contender: Contender) -> Values:
        """The scores of the scored captions' real pictures, after the contender's tokenizer alone."""
        psnr = PeakSignalNoiseRatio(data_range=255.0)
        distances, nearest = [], []
        for real in self._batches(self.own, f"{contender.name}: reconstruction"):
            given_back = restored(contender, real)
            psnr.update(to_tensor(given_back).float(), to_tensor(real).float())
            one, other = self.real.look(given_back), self.real.look(real)
            distances.append(perceptual_distance(one, other).cpu())
            nearest.append(self.real.alike(one.features).argmax(1).cpu())
        return {
            "psnr": psnr.compute().item(),
            "perceptual_distance": torch.cat(distances).double().numpy()[None],
            "own_nearest": (torch.cat(nearest) == torch.tensor(self.own)).numpy()[None],
        }

    def nats(self, contender: Contender) -> Values:
        """The NLL of the scored captions' real pictures, in nats an image. It needs no judge."""
        captions = [caption_of(row) for row in self.pictures.select(self.own)]
        nats = []
        firsts = range(0, len(self.own), self.batch_size)
        for first, real in zip(firsts, self._batches(self.own, f"{contender.name}: nats"), strict=True):
            nats.append(image_nats(contender, real, captions[first : first + self.batch_size]))
        return {"nats_per_image": torch.cat(nats).double().cpu().numpy()[None]}

    def descriptions(self, contender: Contender, max_new_tokens: int) -> Values:
        """The scores of the contender's greedy answers to "Describe the image." about the scored captions' real pictures."""
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": CAPTION_REQUEST}]}
        questions = [Question(own, 1, [turn], []) for own in self.own]
        answers = answer_questions(contender, self.pictures, questions, self.batch_size, max_new_tokens)
        scores: Values = {}
        for label, values in self.labels.items():
            scores |= names_right(label, values, answers, [values[own] for own in self.own], self.encoder)
        return scores
