import numpy as np
import pytest
import torch
from helpers import assert_same, rng
from scoring import digit_features as features
from scoring.digit_features import DigitFeatures, digit_features, to_tensor
from tiny_world.digits import random_scene
from tiny_world.scene_pool import patch_labels
from torchmetrics.image.fid import FrechetInceptionDistance


def held_out(seed: int, count: int = 200) -> tuple[list, torch.Tensor]:
    random = rng(seed)
    scenes = [random_scene(random, "held-out") for _ in range(count)]
    return scenes, to_tensor(np.stack([scene.render("held-out") for scene in scenes]))


def distance(real: torch.Tensor, other: torch.Tensor) -> float:
    metric = FrechetInceptionDistance(feature=digit_features())
    metric.update(real, real=True)
    metric.update(other, real=False)
    return metric.compute().item()


def test_the_features_know_the_quarters_of_scans_that_were_never_seen():
    scenes, images = held_out(0)
    for named, labels in zip(digit_features().names(images), patch_labels(scenes), strict=True):
        assert (named.argmax(-1) == labels[..., 0]).float().mean() > 0.95


def test_the_distance_grows_with_what_differs():
    _, images = held_out(1)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noisy = [(images + scale * noise).clamp(0, 255).to(torch.uint8) for scale in (5, 20, 80)]
    distances = [distance(images, other) for other in (images, *noisy, torch.full_like(images, 16))]
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert distances == sorted(distances)


def test_training_is_the_same_every_time_and_leaves_torchs_random_numbers_alone(monkeypatch):
    monkeypatch.setattr(features, "_STEPS", 5)  # of 200: the first of them already differ where anything does
    first, before = digit_features.__wrapped__(), torch.get_rng_state()
    with torch.no_grad():  # as scores are computed
        again = digit_features.__wrapped__()
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(again.state_dict(), first.state_dict())


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 128, 128, dtype=torch.uint8), torch.zeros(1, 3, 64, 64)])
def test_images_of_another_kind_are_refused(images):
    with pytest.raises(ValueError, match=r"expected uint8, \(B, 3, 64, 64\)"):
        DigitFeatures()(images)
