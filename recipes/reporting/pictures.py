"""Writes grids of pictures as PNG files."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib as mpl
from PIL import Image

mpl.use("Agg")
import matplotlib.pyplot as plt  # after the choice of a backend that needs no screen

Rows = dict[str, list[Image.Image]]


def save_grid(rows: Rows, titles: list[str], path: Path) -> None:
    """Writes a PNG with one row of pictures per name, and the titles above the columns."""
    figure, axes = plt.subplots(
        len(rows), len(titles), figsize=(2.4 * len(titles), 2.6 * len(rows) + 0.6), squeeze=False, layout="constrained"
    )
    for (name, images), line in zip(rows.items(), axes, strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(textwrap.fill(title[:160], 28), fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)
