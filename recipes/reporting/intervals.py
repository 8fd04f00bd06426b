"""Scores with their 95 % intervals, which say what another set of scenes of the same size could give.

One independent trial, here and in every figure that this file makes, is:

- reading: a question. Every scene gets one question of each kind that it can answer.
- drawing, by quarter of a scene (digit, colour, position, emptiness, quarters): a quarter. The quarters of a scene are drawn
  together, so their errors may come together; these intervals are then a little too narrow.
- drawing, by scene (count, scenes): a scene.
- NLL, and differences of base and adapter: a scene, the same one for both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, bootstrap

_NUMBERS_AT_ONCE = 10**7


@dataclass(frozen=True)
class Estimate:
    """A score, its 95 % interval, and its number of trials."""

    value: float
    low: float
    high: float
    n: int


def share(right: Sequence[bool]) -> Estimate:
    """The share of trials that went right, with Wilson's interval."""
    count, n = int(np.sum(right)), len(right)
    interval = binomtest(count, n).proportion_ci(method="wilson")
    return Estimate(count / n, float(interval.low), float(interval.high), n)


def mean_share(shares: Sequence[Estimate]) -> Estimate:
    """The mean of several independent shares. Their distances to their bounds are added like errors (MOVER)."""
    value = sum(share.value for share in shares) / len(shares)
    below = math.hypot(*(share.value - share.low for share in shares)) / len(shares)
    above = math.hypot(*(share.high - share.value for share in shares)) / len(shares)
    return Estimate(value, value - below, value + above, sum(share.n for share in shares))


def mean(values: np.ndarray) -> Estimate:
    """The mean of one value per scene, (N,), with a bootstrap interval over scenes. For differences it is a paired interval."""
    at_once = max(1, _NUMBERS_AT_ONCE // len(values))  # resamples at once: all ten thousand take gigabytes for a large dataset
    rng = np.random.default_rng(0)
    interval = bootstrap((values,), np.mean, method="percentile", batch=at_once, rng=rng).confidence_interval
    return Estimate(float(values.mean()), float(interval.low), float(interval.high), len(values))


def estimate(values: np.ndarray) -> Estimate:
    """The share or mean of values, (turns, N), boolean or not. N counts the trials: all turns of one are one."""
    if values.dtype == bool and (len(values) == 1 or values.all() or not values.any()):
        return share(values[0])  # where all are alike, a bootstrap would have no interval
    return mean(values.mean(0))


def in_percent(estimate: dict[str, float]) -> str:
    """A share, as the dict of its `Estimate`, as text with its interval."""
    return "{:.1f} % ({:.1f} to {:.1f})".format(*(100 * estimate[name] for name in ("value", "low", "high")))
