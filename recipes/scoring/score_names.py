"""What the scores of evaluate_dataset.py are called in a table, and how they are written there."""

from __future__ import annotations

from reporting.intervals import in_percent

LABELS = {
    "fid": "drawing: FID",
    "clip_score": "drawing: CLIP score",
    "seconds": "drawing: seconds an image",
    "frechet_distance": "drawing: Fréchet distance, EfficientNet-Lite0 features",
    "nats_per_image": "drawing: NLL of the real pictures (nats an image, 95 %)",
    "psnr": "reconstruction: PSNR (dB)",
    "perceptual_distance": "reconstruction: perceptual distance (95 %)",
    "own_nearest": "reconstruction: nearest to its own picture (95 %)",
    "exact_match": "answers: exact match (95 %)",
    "vqa_accuracy": "answers: VQA accuracy (95 %)",
}
OF_LABELS = {
    "_nearest": "drawing: {} of the nearest real picture (95 %)",
    "_nearest_5": "drawing: {} among the nearest five (95 %)",
    "_nearest_given_others": "drawing: {} of the nearest whose other labels are right (95 %)",
    "_named": "description: {} named (95 %)",
    "_likeness": "description: likeness of the {} (95 %)",
}
NUMBERS = ("nats_per_image", "perceptual_distance", "_likeness")  # ends of the names of scores that are no shares


def label_of(what: str) -> str:
    """What a score is called."""
    if what in LABELS:
        return LABELS[what]
    return next(text.format(what.removesuffix(end)) for end, text in OF_LABELS.items() if what.endswith(end))


def score_text(what: str, value: float | dict[str, float] | None) -> str:
    """A number, or a share in per cent; with its interval if it has one. Empty if there is none."""
    if value is None:
        return ""
    if not isinstance(value, dict):
        return f"{value:.3g}"
    if what.endswith(NUMBERS):
        form = "{value:.1f} ({low:.1f} to {high:.1f})" if what == "nats_per_image" else "{value:.3f} ({low:.3f} to {high:.3f})"
        return form.format(**value)
    return in_percent(value)


def difference_text(what: str, value: dict[str, float]) -> str:
    """A difference with its interval; that of two shares is in points of a hundred."""
    if what.endswith(NUMBERS):
        return score_text(what, value)
    return "{:.1f} ({:.1f} to {:.1f})".format(*(100 * value[name] for name in ("value", "low", "high")))
