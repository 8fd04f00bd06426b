"""Families with a shared vocabulary: one VQ tokenizer encodes images to read and to draw; its codes are in the vocabulary."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F

from .family import Family, weight_of


class SharedVocabularyFamily(Family):
    """The common part of these families."""

    shared_vocabulary = True
    _code_token_ids: torch.Tensor | None = None

    @property
    def code_token_ids(self) -> torch.Tensor:
        """The token id of each code, (K,), on the device of the embeddings."""
        if self._code_token_ids is None or self._code_token_ids.device != self.device:
            self._code_token_ids = self.token_ids_of_codes.long().to(self.device)
        return self._code_token_ids

    @property
    def token_ids_of_codes(self) -> torch.Tensor:
        """The same, as the base's config gives them."""
        return self.base.model.vocabulary_mapping.img2bpe_mapping_tensor

    def read_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.embed_codes(self.dense_codes(pixel_values))

    def encoded_codes(self, encoded) -> list[torch.Tensor]:
        """Returns the codes of each of N images, (H, W) each, from the output of the base's `get_image_features`.

        Only a family that compresses what it reads needs it.
        """
        raise NotImplementedError

    @property
    def codebook(self) -> torch.Tensor:
        return weight_of(self.base.model.vqmodel.quantize.embedding).detach().float()

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
        token_ids = self.token_ids_of_codes.tolist()
        run = slice(token_ids[0], token_ids[0] + len(token_ids))
        return run if token_ids == list(range(run.start, run.stop)) else None
