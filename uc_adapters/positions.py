"""Position ids of whole sequences: each text token adds one, and images stand where the base's own sequence has them."""

from __future__ import annotations

import torch

from .families import Family
from .images import Images
from .layers import Grid


def dense_deltas(family: Family, grid: Grid) -> torch.Tensor:
    """Returns by how much the position id grows at each code of an image and at the token after it, (..., T + 1)."""
    positions = family.code_positions(grid).to(family.device)
    return positions.diff(prepend=torch.full_like(positions[..., :1], -1))


def dense_reading(family: Family, read: Images, places: torch.Tensor) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Returns the images that are read as the base's own codes, at `places` (B, L), as an entry for `sequence_positions`."""
    if family.compresses_reading or read.values is None:
        return []
    return [(places, [dense_deltas(family, family.read_grid(size)) for size in read.sizes(family)])]


def sequence_positions(mask: torch.Tensor, images: list[tuple[torch.Tensor, list[torch.Tensor]]]) -> torch.Tensor:
    """Returns the position ids of sequences, (B, L), or (axes, B, L).

    Args:
        mask: The attention mask, (B, L). Padding does not count.
        images: For each kind of images, their places (B, L), and for each image by how much the position id grows at its tokens
            and at the token after it, (n + 1,) or (axes, n + 1).
    """
    axes = images[0][1][0].shape[:-1]
    deltas = mask.long().expand(*axes, *mask.shape)
    for places, of_images in images:
        deltas = deltas.masked_scatter(places, torch.cat([image[..., :-1] for image in of_images], -1))
    if axes:  # on a single axis the token after an image adds one, as any other
        for places, of_images in images:
            ends = torch.tensor([image.shape[-1] - 1 for image in of_images]).cumsum(0) - 1
            after = places.flatten().nonzero().flatten()[ends.to(places.device)] + 1  # (images,), counted over the batch
            more = torch.stack([image[..., -1] - 1 for image in of_images], -1)  # (axes, images)
            inside = after % mask.shape[1] > 0  # nothing follows an image at the end of a sequence
            deltas = deltas.flatten(-2).index_add(-1, after[inside], more[..., inside]).unflatten(-1, mask.shape)
    return (deltas.cumsum(-1) - 1).clamp(min=0)
