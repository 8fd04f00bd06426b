"""Finds the largest batch of drawings that fits on a GPU: extrapolated from the peaks of smaller ones, then drawn once."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from timing.stopwatch import fitting, seconds_of

SPARE = 0.96  # the share of the free memory to aim for; the allocator loses some between its blocks
TRIES = 4


def largest_batch(draw: Callable[[int], object], peaks: dict[int, int]) -> tuple[int, float] | None:
    """Returns the largest batch that fits, and the seconds of drawing it.

    Args:
        draw: Draws a batch of a given size.
        peaks: The peak bytes of a drawing, beyond what was held before it, of at least two batch sizes.

    Returns:
        The batch size, a multiple of 8, and seconds; None if none of a few tries fitted.
    """
    (small, low), (large, high) = sorted(peaks.items())[-2:]
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    per_drawing = (high - low) / (large - small)
    batch = large + int((SPARE * free - high) / per_drawing)
    for _ in range(TRIES):
        batch -= batch % 8
        seconds = fitting(lambda batch=batch: seconds_of(lambda: draw(batch)))
        if seconds is not None:
            return batch, seconds
        batch = int(0.93 * batch)
    return None
