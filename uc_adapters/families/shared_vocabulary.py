"""Families with a shared vocabulary: one VQ tokenizer encodes images to read and to draw; its codes are in the vocabulary."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F

from ..errors import InputError
from ..layers import Grid
from .family import Family, Geometry, Size, weight_of

POSITIONS_SIDE = 32  # side of the grid on which positions are learned; they are interpolated to other grids


class SharedVocabularyFamily(Family):
    """The common part of these families."""

    shared_vocabulary = True
    _code_token_ids: torch.Tensor | None = None

    @property
    def code_token_ids(self) -> torch.Tensor:
        """The token id of each code, (K,), on the device of the embeddings."""
        if self._code_token_ids is None or self._code_token_ids.device != self.device:
            self._code_token_ids = self.token_ids_of_codes().to(self.device)
        return self._code_token_ids

    def token_ids_of_codes(self) -> torch.Tensor:
        """Returns the token id of each code, (K,), on any device."""
        return self.base.model.vocabulary_mapping.img2bpe_mapping_tensor.long()

    def read_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.embed_codes(self.dense_codes(pixel_values))

    def encoded_codes(self, encoded, input_ids: torch.Tensor | None, stride: int) -> list[torch.Tensor]:
        """Returns the codes of each of N images, (H, W) each, that transformers' `generate` has encoded densely.

        Args:
            encoded: The output of the base's `get_image_features`.
            input_ids: The prompts (B, L), from which the sizes can be read if the output does not have them.
            stride: The adapter's stride.
        """
        raise NotImplementedError  # needed only if `compresses_reading`

    @property
    def codebook(self) -> torch.Tensor:
        tokenizer = self.base.get_submodule(self.module_names["tokenizer"])
        return weight_of(tokenizer.quantize.embedding).detach().float()

    def embed_codes(self, codes: torch.Tensor) -> torch.Tensor:
        return self.base.get_input_embeddings()(self.code_token_ids[codes])

    def code_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Computes the rows of the text head that stand for codes. So only image tokens can be drawn in an image."""
        weight = weight_of(self.base.lm_head)
        rows = weight[self._run] if self._run is not None else weight[self.code_token_ids]  # a slice copies nothing
        return F.linear(hidden.to(weight.dtype), rows)

    @cached_property
    def _run(self) -> slice | None:
        """The slice of the vocabulary that holds the codes' tokens, if they are consecutive and in order; else None."""
        token_ids = self.token_ids_of_codes().tolist()
        run = slice(token_ids[0], token_ids[0] + len(token_ids))
        return run if token_ids == list(range(run.start, run.stop)) else None


class AnySizeFamily(SharedVocabularyFamily):
    """The common part of those whose images have any size. They set `_factor`, the side of a code in pixels."""

    _factor: int

    def _geometry(self, num_codes: int, code_width: int) -> Geometry:
        text = self.base.config.text_config
        return Geometry(
            model_type=self.model_type,
            hidden_size=text.hidden_size,
            num_layers=text.num_hidden_layers,
            num_heads=text.num_attention_heads,
            intermediate_size=text.intermediate_size,
            image_size=None,
            read_layers=None,
            read_width=text.hidden_size,
            read_side=POSITIONS_SIDE,
            draw_side=POSITIONS_SIDE,
            num_codes=num_codes,
            code_width=code_width,
        )

    def sizes(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None) -> list[Size]:
        return [(int(height), int(width)) for height, width in image_sizes]

    def read_grid(self, size: Size) -> Grid:
        return size[0] // self._factor, size[1] // self._factor

    def draw_grid(self, size: Size) -> Grid:
        return self.read_grid(size)

    def check_pixels(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None) -> None:
        """Raises InputError unless pixels are (N, 3, H, W), and each image is made of whole codes and lies within H x W."""
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != 3 or shape[0] == 0:
            raise InputError(
                f"pixel_values of shape {shape}; expected (images, 3, height, width) with at least one image. Let the "
                "processor prepare RGB images: processor(text=..., images=...)."
            )
        self.check_sizes(shape[0], image_sizes)
        for height, width in self.sizes(pixel_values, image_sizes):
            factor, within = self._factor, 0 < height <= shape[2] and 0 < width <= shape[3]
            if not within or height % factor or width % factor:
                raise InputError(
                    f"An image of {height} x {width} pixels in pixel_values of shape {shape}; expected multiples of {factor} "
                    "that lie within this shape. Let the processor prepare images: processor(text=..., images=...)."
                )
