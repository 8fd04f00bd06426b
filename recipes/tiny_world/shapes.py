"""The sizes of a tiny Janus, and of the batches that it trains on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The sizes of a tiny Janus for images of 64 x 64, and of its training.

    Attributes:
        patch: The pixels of a code, and of a patch that the vision tower reads, along one side.
        codes: The codes of the VQ tokenizer.
        vq_base, vq_channels: The channels of the VQ tokenizer at each resolution are `vq_base` times each of `vq_channels`.
        vq_blocks: Its residual blocks at each resolution.
        width, layers, mlp: Of the language model. A head has 32 dimensions.
        vision_width, vision_layers: Of the vision tower.
        vq_rows, vision_rows, read_rows, draw_rows: The images in a batch of each stage.
        kmeans_latents: The latents of real images that the codebook starts from.
        learning_rate: The peak learning rate of the vision tower and the language model.
        guidance: The classifier-free guidance in the base's generation config. A base that knows its pictures by heart is sure
            of every code, also without a caption, and more guidance leads it to codes that fit neither.
    """

    patch: int = 8
    codes: int = 512
    vq_base: int = 32
    vq_channels: tuple[int, ...] = (1, 1, 1, 2)
    vq_blocks: int = 0
    width: int = 192
    layers: int = 4
    mlp: int = 512
    vision_width: int = 128
    vision_layers: int = 3
    vq_rows: int = 24
    vision_rows: int = 48
    read_rows: int = 24
    draw_rows: int = 32
    kmeans_latents: int = 2**15
    learning_rate: float = 2e-3
    guidance: float = 2.0


SHAPES = {
    "tiny": Shape(),
    "small": Shape(
        patch=4,
        codes=1024,
        vq_base=64,
        vq_channels=(1, 1, 2),
        vq_blocks=1,
        width=384,
        layers=8,
        mlp=896,
        vision_width=192,
        vision_layers=4,
        vq_rows=64,
        vision_rows=128,
        read_rows=48,
        draw_rows=128,
        learning_rate=1e-3,
        guidance=1.1,
    ),
}
