"""Caches the VQ tokenizer's latents of the pictures that a dataset draws, so that a second run starts at once.

The cache is that of `datasets`: a file that is renamed when it is whole. Its name depends on the rows, the base's weights and
the processor's image settings. Codes are not stored, because a matrix product finds them: the latents' nearest entries.
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

from datasets import Dataset, Features, List, Value
from rows.conversations import decoded, fingerprint_of
from transformers import ProcessorMixin

from uc_adapters import UniCompressModel
from uc_adapters.images import pack_latents

OF_PICTURE = {"size": List(Value("int32")), "values": Value("binary")}


def with_latents(rows: Dataset, model: UniCompressModel, processor: ProcessorMixin) -> Dataset:
    """Adds a column `latents` to rows of `conversations`: one entry per image, None for an image that is only read."""
    drawn = [
        [image if drawn else None for image, drawn in zip(images, _are_drawn(messages, given), strict=True)]
        for images, messages, given in zip(rows["images"], rows["messages"], rows["given"], strict=True)
    ]
    index_of, new = {}, []  # the index of each picture's latents, and the pictures that each row is the first to draw
    for images in drawn:
        pictures = {_key(image): image for image in images if image is not None and _key(image) not in index_of}
        index_of |= {key: len(index_of) + number for number, key in enumerate(pictures)}
        new.append(list(pictures.values()))
    settings = rows._fingerprint, model.active_peft_config.base_fingerprint, processor.image_processor.to_dict()
    latents = rows.map(
        lambda _, indices: _encoded([image for row in indices for image in new[row]], model, processor),
        batched=True,
        batch_size=32,
        with_indices=True,
        remove_columns=rows.column_names,
        features=Features(OF_PICTURE),
        new_fingerprint=fingerprint_of("drawn pictures", *settings),
        desc="encode images",
    )

    def of_rows(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        found = [[None if image is None else latents[index_of[_key(image)]] for image in drawn[row]] for row in indices]
        return {"latents": found}

    return rows.map(
        of_rows,
        batched=True,
        batch_size=32,
        with_indices=True,
        features=Features({**rows.features, "latents": List(OF_PICTURE)}),
        new_fingerprint=fingerprint_of("rows with drawn pictures", *settings),
        desc="find latents",
    )


def _are_drawn(messages: list[dict], given: int) -> list[bool]:
    """For each image of a conversation, in order, whether it is learned as a drawing; the first `given` turns are context."""
    learned = [turn["role"] == "assistant" and index >= given for index, turn in enumerate(messages)]
    pairs = zip(learned, messages, strict=True)
    return [is_learned for is_learned, turn in pairs for part in turn["content"] if part["type"] == "image"]


def _key(image: dict) -> bytes:
    """A key that is the same for the same picture."""
    content = str(Path(image["path"]).absolute()).encode() if image["bytes"] is None else image["bytes"]
    return blake2b(content, digest_size=16).digest()


def _encoded(images: list[dict], model: UniCompressModel, processor: ProcessorMixin) -> dict[str, list]:
    """The packed latents of images, as columns of OF_PICTURE."""
    packed = pack_latents(model.family, processor, decoded({"images": images})["images"]) if images else []
    return {name: [of_image[name] for of_image in packed] for name in OF_PICTURE}
