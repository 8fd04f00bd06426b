"""Scores with their 95 % intervals: what a second set of scenes of the same size could have given.

What counts as one independent trial, here and in every figure that is made with this file:

- reading: a question. Every scene is asked one of each kind that it settles.
- drawing, by quarter of a scene (digit, colour, position, emptiness, quarters): a quarter. The quarters of a scene are drawn
  together, so their errors may come together; these intervals are then a little too narrow.
- drawing, by scene (count, scenes): a scene.
- nats, and differences of base and adapter: a scene, the same one for both.
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
    """A score, its 95 % interval, and how many trials it was made of."""

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
    """The mean of several shares of trials of their own: each one's distance to its bounds adds up as errors do (MOVER)."""
    value = sum(share.value for share in shares) / len(shares)
    below = math.hypot(*(share.value - share.low for share in shares)) / len(shares)
    above = math.hypot(*(share.high - share.value for share in shares)) / len(shares)
    return Estimate(value, value - below, value + above, sum(share.n for share in shares))


def mean(values: np.ndarray) -> Estimate:
    """The mean of a value a scene, (N,), with the bootstrap's interval over scenes; of a difference, it is the paired one."""
    at_once = max(1, _NUMBERS_AT_ONCE // len(values))  # resamples: ten thousand of a large dataset's answers take gigabytes
    rng = np.random.default_rng(0)
    interval = bootstrap((values,), np.mean, method="percentile", batch=at_once, rng=rng).confidence_interval
    return Estimate(float(values.mean()), float(interval.low), float(interval.high), len(values))
