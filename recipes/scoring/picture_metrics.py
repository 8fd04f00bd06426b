"""FID and CLIP score of contenders' drawings for the captions of a dataset, by torchmetrics."""

from __future__ import annotations

import importlib
from functools import partial

import torch
from datasets import Dataset
from PIL import Image, ImageOps
from rows.captions import caption_of
from rows.conversations import decoded
from scoring.contenders import Contender, draw_in_turn, side_by_side
from scoring.picture_judge import PictureJudge
from scoring.real_pictures import to_tensor
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.multimodal.clip_score import CLIPScore
from transformers import CLIPModel, CLIPProcessor

INCEPTION = "inception"
NO_METRIC = "none"


class ClipFeatures(CLIPModel):
    """A CLIP whose features are tensors, as torchmetrics needs; in transformers 5 they are a whole model output."""

    def get_image_features(self, *args, **kwargs) -> torch.Tensor:
        return super().get_image_features(*args, **kwargs).pooler_output

    def get_text_features(self, *args, **kwargs) -> torch.Tensor:
        return super().get_text_features(*args, **kwargs).pooler_output


def load_features(name: str) -> int | nn.Module | None:
    """Loads the features that FID compares, as torchmetrics' `feature`.

    Args:
        name: "inception", "none", or "module:factory": a function without arguments that returns a module from images
            (B, 3, H, W) uint8, of the size of the drawings, to features (B, F), with `num_features` = F.

    Raises:
        SystemExit: The features cannot be loaded. The message says how to get them.
    """
    if name == NO_METRIC:
        return None
    if name == INCEPTION:
        try:
            FrechetInceptionDistance(2048)
        except ModuleNotFoundError:
            raise SystemExit(
                "--features inception needs torch-fidelity, which is not installed: pip install torch-fidelity. Or pass "
                "--features module:factory with an extractor of your own, or --features none for no FID."
            ) from None
        except OSError as error:  # its weights are downloaded at the first use
            raise SystemExit(
                f"--features inception: its weights could not be loaded: {error}. Go online once, or pass --features "
                "module:factory with an extractor of your own, or --features none for no FID."
            ) from error
        return 2048
    module, _, factory = name.partition(":")
    try:
        features = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise SystemExit(
            f"--features {name}: {error}; expected {INCEPTION}, {NO_METRIC} or module:factory, a function that returns the "
            "extractor. Its folder has to be on PYTHONPATH."
        ) from error
    if not isinstance(features, nn.Module) or not isinstance(getattr(features, "num_features", None), int):
        raise SystemExit(f"--features {name} returned {type(features).__name__}; expected an nn.Module with num_features.")
    return features.eval()


def load_clip(name: str) -> tuple[ClipFeatures, CLIPProcessor] | None:
    """Loads a CLIP by its folder or Hub id; None for "none".

    Raises:
        SystemExit: It cannot be loaded, or lacks weights.
    """
    if name == NO_METRIC:
        return None
    try:
        clip, loaded = ClipFeatures.from_pretrained(name, output_loading_info=True)
        if loaded["missing_keys"]:  # transformers would continue with random weights
            raise ValueError(f"{len(loaded['missing_keys'])} of a CLIPModel's weights are not in it")
        return clip.eval(), CLIPProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"--clip {name} cannot be loaded: {error}. Expected a folder or Hub id of a CLIPModel and its processor; or pass "
            "--clip none for no CLIP score."
        ) from error


class PictureMetrics:
    """Accumulates FID and CLIP score of one contender, batch by batch."""

    def __init__(self, features: int | nn.Module | None, clip: tuple[ClipFeatures, CLIPProcessor] | None, device: str):
        self.fid = None if features is None else FrechetInceptionDistance(features).to(device)
        self.clip = None
        if clip is not None:
            model, processor = clip
            # The processor truncates to the model's context and keeps the EOS token; torchmetrics would cut EOS off.
            truncating = partial(processor, truncation=True, max_length=model.config.text_config.max_position_embeddings)
            self.clip = CLIPScore(lambda: (model, truncating)).to(device)
        self.device = device

    def update(self, captions: list[str], drawn: list[Image.Image], real: list[Image.Image]) -> None:
        """Adds a batch. Real images are cropped and scaled to the size of the drawings."""
        pixels = to_tensor(drawn).to(self.device)
        if self.fid is not None:
            fitted = [ImageOps.fit(image, drawn[0].size, Image.Resampling.BICUBIC) for image in real]
            self.fid.update(to_tensor(fitted).to(self.device), real=True)
            self.fid.update(pixels, real=False)
        if self.clip is not None:
            self.clip.update(pixels, captions)

    def compute(self) -> dict[str, float]:
        """The scores: "fid", for which 0 is best, and "clip_score", 100 times the mean cosine, from 0 to 100."""
        scores = {"fid": self.fid, "clip_score": self.clip}
        return {name: metric.compute().item() for name, metric in scores.items() if metric is not None}


def score_pictures(
    pair: list[Contender],
    rows: Dataset,
    features: int | nn.Module | None,
    clip: tuple[ClipFeatures, CLIPProcessor] | None,
    seed: int,
    batch_size: int,
    judge: PictureJudge | None = None,
    samples: int = 1,
    **sampling,
) -> dict[str, dict[str, float]]:
    """FID, CLIP score and seconds per image of each contender. All draw the same captions in turn, from the same seeds.

    Args:
        rows: At least two rows of `conversations`, each a caption and the image to draw for it.
        features: What `load_features` returned.
        clip: What `load_clip` returned.
        seed: Seed of the sampling.
        batch_size: Captions drawn at once.
        judge: A judge of the same captions, which sees the drawings.
        samples: Drawings of each caption.
        **sampling: Arguments of `generate`.
    """
    metrics = {contender.name: PictureMetrics(features, clip, contender.model.device) for contender in pair}
    seconds = dict.fromkeys(metrics, 0.0)
    numbers = [*range(len(rows))] * samples
    captions = [caption_of(row) for row in rows] * samples
    for batch, contender, drawn, taken in draw_in_turn(pair, captions, seed, batch_size, **sampling):
        real = [decoded(row)["images"][0] for row in rows.select(numbers[batch])]
        metrics[contender.name].update(captions[batch], drawn, real)
        if judge is not None:
            judge.update(contender.name, drawn, numbers[batch])
        seconds[contender.name] += taken
    return side_by_side(
        {name: metric.compute() | {"seconds": seconds[name] / len(captions)} for name, metric in metrics.items()}
    )
