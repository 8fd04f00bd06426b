"""The tiny world: 64 x 64 scenes of real handwritten digits, their captions and questions, and their judge.

A scene is a 2 x 2 layout of 32-pixel quarters. A quarter is empty or holds one scan from scikit-learn's
`load_digits`, enlarged to 28 x 28 and tinted with one of six colours. `load_scans` defines the one split of the
scans: everything that trains uses "train", everything that is reported uses "held-out".
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

IMAGE_SIZE = 64
QUARTER_SIZE = 32
DIGIT_SIZE = 28
MARGIN = (QUARTER_SIZE - DIGIT_SIZE) // 2
BACKGROUND = 16
PLACES = ("top left", "top right", "bottom left", "bottom right")
COLOURS = {
    "red": (235, 50, 50),
    "yellow": (230, 220, 40),
    "green": (50, 210, 70),
    "cyan": (50, 215, 225),
    "blue": (70, 90, 245),
    "magenta": (235, 60, 220),
}
QUESTION_KINDS = ("digit", "colour", "count")
DESCRIBE = "Describe the image."
_SPLIT_SEED = 20260320


@cache
def load_scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The scans of one split, "train" (1 437) or "held-out" (360).

    Returns:
        scans (N, 8, 8) float32 in [0, 1] and their digits (N,).
    """
    images, digits = load_digits(return_X_y=True)
    train_x, held_x, train_y, held_y = train_test_split(
        images.reshape(-1, 8, 8).astype(np.float32) / 16.0, digits, test_size=0.2, stratify=digits, random_state=_SPLIT_SEED
    )
    return {"train": (train_x, train_y), "held-out": (held_x, held_y)}[split]


@cache
def _enlarged_scans(split: str) -> np.ndarray:
    scans, _ = load_scans(split)
    size = (DIGIT_SIZE, DIGIT_SIZE)
    return np.stack([np.asarray(Image.fromarray(scan).resize(size, Image.Resampling.BILINEAR)) for scan in scans])


@cache
def _tinted_scan(split: str, scan: int, colour: str) -> np.ndarray:
    """A scan's pixels in its colour, (28, 28, 3) uint8. A training sees most of them many times."""
    ink = _enlarged_scans(split)[scan][..., None]  # (28, 28, 1)
    return (BACKGROUND + ink * (np.array(COLOURS[colour], dtype=np.float32) - BACKGROUND)).round().astype(np.uint8)


@dataclass(frozen=True)
class Quarter:
    """One tinted digit: its value, the name of its colour, and the index of the scan that shows it."""

    digit: int
    colour: str
    scan: int = -1


def check_scene_size(image_size: int | None) -> None:
    """Exits if the images of a base have another size than scenes; None means any size."""
    if image_size not in (None, IMAGE_SIZE):
        raise SystemExit(
            f"The base's pictures have {image_size} pixels a side, digit scenes {IMAGE_SIZE}; expected a tiny base, or a "
            "--dataset, which finetune.py and evaluate_dataset.py take."
        )


@dataclass(frozen=True)
class Scene:
    """Four quarters in raster order; `None` is an empty quarter."""

    quarters: tuple[Quarter | None, ...]

    def caption(self, order: list[int] | None = None) -> str:
        """The filled quarters as text, in raster order or `order`: "a red 3 at the top left and a blue 7 at the top right"."""
        filled = [place for place in (order or range(4)) if self.quarters[place] is not None]
        return " and ".join(f"a {self.quarters[p].colour} {self.quarters[p].digit} at the {PLACES[p]}" for p in filled)

    def shuffled_caption(self, rng: np.random.Generator) -> str:
        """The caption with its quarters in random order, as a prompt to draw."""
        return self.caption([int(place) for place in rng.permutation(4)])

    def question(self, kind: str, rng: np.random.Generator) -> tuple[str, str] | None:
        """A question of one of `QUESTION_KINDS` and its answer; `None` if the scene has no single answer to it."""
        filled = [place for place in range(4) if self.quarters[place] is not None]
        if kind == "count":
            return "How many digits are there?", str(len(filled))
        if kind == "digit":
            place = filled[rng.integers(len(filled))]
            return f"What digit is at the {PLACES[place]}?", str(self.quarters[place].digit)
        digits = [self.quarters[place].digit for place in filled]
        unique = [place for place in filled if digits.count(self.quarters[place].digit) == 1]
        if not unique:
            return None
        quarter = self.quarters[unique[rng.integers(len(unique))]]
        return f"What colour is the {quarter.digit}?", quarter.colour

    def render(self, split: str) -> np.ndarray:
        """The scene's pixels, (64, 64, 3) uint8."""
        pixels = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), BACKGROUND, dtype=np.uint8)
        for place, quarter in enumerate(self.quarters):
            if quarter is not None:
                top, left = (QUARTER_SIZE * index + MARGIN for index in divmod(place, 2))
                tinted = _tinted_scan(split, quarter.scan, quarter.colour)
                pixels[top : top + DIGIT_SIZE, left : left + DIGIT_SIZE] = tinted
        return pixels

    def image(self, split: str) -> Image.Image:
        """The scene as a PIL image."""
        return Image.fromarray(self.render(split))


def random_scene(rng: np.random.Generator, split: str) -> Scene:
    """A scene of one to four digits (uniformly), in random quarters and colours, shown by scans of `split`."""
    _, digits = load_scans(split)
    quarters: list[Quarter | None] = [None] * 4
    for place in rng.permutation(4)[: rng.integers(1, 5)]:
        scan = int(rng.integers(len(digits)))
        quarters[place] = Quarter(int(digits[scan]), list(COLOURS)[rng.integers(len(COLOURS))], scan)
    return Scene(tuple(quarters))


@cache
def _digit_judge() -> SVC:
    scans, digits = load_scans("train")
    return SVC(C=10.0, gamma="scale").fit(scans.reshape(len(scans), -1), digits)


def judge(images: np.ndarray) -> list[Scene]:
    """Recognises drawn scenes with a classifier trained on the real scans, without any part of the model.

    A quarter whose brightest ink is faint is empty. Otherwise its colour is the nearest hue, and an SVC trained on the
    raw 8 x 8 scans of the train split classifies its digit, from the quarter scaled back to 8 x 8.

    Args:
        images: (B, 64, 64, 3) uint8.
    """
    # (B, 64, 64, 3) -> (B * 4, 28, 28, 3): the four quarters without their margins
    quarters = images.reshape(-1, 2, QUARTER_SIZE, 2, QUARTER_SIZE, 3).transpose(0, 1, 3, 2, 4, 5)
    quarters = quarters.reshape(-1, QUARTER_SIZE, QUARTER_SIZE, 3)[:, MARGIN:-MARGIN, MARGIN:-MARGIN].astype(np.float32)
    ink = (quarters - BACKGROUND).max(-1)  # (B * 4, 28, 28)
    peak = np.quantile(ink, 0.98, axis=(1, 2))  # a quantile, so that one odd pixel is not ink
    small = np.stack(
        [np.asarray(Image.fromarray(x).resize((8, 8), Image.Resampling.BOX)) for x in ink / np.maximum(peak, 1)[:, None, None]]
    )
    digits = _digit_judge().predict(small.clip(0, 1).reshape(len(small), -1))
    read: list[Quarter | None] = []
    for quarter, quarter_ink, quarter_peak, digit in zip(quarters, ink, peak, digits, strict=True):
        if quarter_peak < 60:
            read.append(None)
            continue
        tint = quarter[quarter_ink > 0.6 * quarter_peak].mean(0)
        read.append(Quarter(int(digit), _nearest_hue(tint)))
    return [Scene(tuple(read[i : i + 4])) for i in range(0, len(read), 4)]


def right_by_aspect(asked: Scene, drawn: Scene) -> dict[str, list[bool]]:
    """Which parts of a drawn scene are right, by aspect: one value per quarter that the aspect covers, or one per scene.

    - digit, colour: of the quarters where a digit was asked, those that show it, or its colour.
    - position: of all quarters, those that are filled where a digit was asked and empty elsewhere.
    - emptiness: of the quarters where nothing was asked, those that are empty.
    - count: whether as many quarters are filled as were asked.
    - quarters: of all quarters, those with the asked digit in the asked colour, or empty where nothing was asked.
    - scenes: whether all four quarters are right.
    """
    pairs = list(zip(asked.quarters, drawn.quarters, strict=True))
    filled = [(a, d) for a, d in pairs if a is not None]
    position = [(a is None) == (d is None) for a, d in pairs]
    quarters = [
        p and (a is None or (a.digit, a.colour) == (d.digit, d.colour)) for p, (a, d) in zip(position, pairs, strict=True)
    ]
    return {
        "digit": [d is not None and d.digit == a.digit for a, d in filled],
        "colour": [d is not None and d.colour == a.colour for a, d in filled],
        "position": position,
        "emptiness": [d is None for a, d in pairs if a is None],
        "count": [sum(d is not None for _, d in pairs) == len(filled)],
        "quarters": quarters,
        "scenes": [all(quarters)],
    }


def right_quarters(asked: Scene, drawn: Scene) -> int:
    """How many of the four quarters are right: the asked digit in the asked colour, or empty where nothing was asked."""
    return sum(right_by_aspect(asked, drawn)["quarters"])


def _nearest_hue(rgb: np.ndarray) -> str:
    def hue(value) -> float:
        return colorsys.rgb_to_hsv(*(float(channel) / 255 for channel in value))[0]

    def distance(name: str) -> float:
        gap = abs(hue(rgb) - hue(COLOURS[name]))
        return min(gap, 1 - gap)

    return min(COLOURS, key=distance)
