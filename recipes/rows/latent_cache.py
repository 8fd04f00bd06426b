"""The VQ tokenizer's latents of the pictures that a dataset draws, computed once: the second run starts at once.

The cache is that of `datasets`: a file that is renamed when it is whole, named after the rows, the base's weights and the
processor's image settings. Codes are the latents' nearest entries, a product of matrices away, and are not stored beside them.
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
    """Adds a column `latents` to rows of `conversations`: an entry an image, None for one that is only read."""
    drawn = [
        [image if drawn else None for image, drawn in zip(images, _are_drawn(messages, given), strict=True)]
        for images, messages, given in zip(rows["images"], rows["messages"], rows["given"], strict=True)
    ]
    places, new = {}, []  # where each picture's latents are, and which pictures a row is the first to draw
    for of_row in drawn:
        pictures = {_key(image): image for image in of_row if image is not None and _key(image) not in places}
        places |= {key: len(places) + place for place, key in enumerate(pictures)}
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
        found = [[None if image is None else latents[places[_key(image)]] for image in drawn[row]] for row in indices]
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
    """Whether each image of a conversation, in order, is learned as a drawing; those of `given` turns are context."""
    learned = [turn["role"] == "assistant" and place >= given for place, turn in enumerate(messages)]
    return [own for own, turn in zip(learned, messages, strict=True) for part in turn["content"] if part["type"] == "image"]


def _key(image: dict) -> bytes:
    """The same for the same picture."""
    content = str(Path(image["path"]).absolute()).encode() if image["bytes"] is None else image["bytes"]
    return blake2b(content, digest_size=16).digest()


def _encoded(images: list[dict], model: UniCompressModel, processor: ProcessorMixin) -> dict[str, list]:
    packed = pack_latents(model.family, processor, decoded({"images": images})["images"]) if images else []
    return {name: [of_image[name] for of_image in packed] for name in OF_PICTURE}
