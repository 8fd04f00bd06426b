"""The VQ tokenizer's latents of a dataset's images, computed once: the second run starts at once.

The cache is that of `datasets`: a file that is renamed when it is whole, named after the rows, the base's weights and the
processor's image settings. Codes are the latents' nearest entries, a product of matrices away, and are not stored beside them.
"""

from __future__ import annotations

from conversations import decoded, fingerprint_of
from datasets import Dataset, Features, List, Value
from transformers import ProcessorMixin

from uc_adapters import UniCompressModel
from uc_adapters.images import pack_latents

LATENTS = List({"size": List(Value("int32")), "values": Value("binary")})


def with_latents(rows: Dataset, model: UniCompressModel, processor: ProcessorMixin) -> Dataset:
    """Adds a column `latents` to rows of `conversations`, for the images of each first row; others' are empty."""

    def encode(batch: dict[str, list]) -> dict[str, list]:
        rows = zip(batch["images"], batch["first"], strict=True)
        images = [decoded({"images": images})["images"] if first else [] for images, first in rows]
        every = [image for of_row in images for image in of_row]
        packed = iter(pack_latents(model.family, processor, every) if every else [])
        return {"latents": [[next(packed) for _ in of_row] for of_row in images]}

    settings = rows._fingerprint, model.active_peft_config.base_fingerprint, processor.image_processor.to_dict()
    return rows.map(
        encode,
        batched=True,
        batch_size=32,
        features=Features({**rows.features, "latents": LATENTS}),
        new_fingerprint=fingerprint_of(*settings),
        desc="encode images",
    )
