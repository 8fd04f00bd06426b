"""Families whose images are words: one VQ tokenizer for what is read and drawn, its codes words of the vocabulary."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property

import torch
import torch.nn.functional as F

from .family import Family, weight_of


class SharedVocabularyFamily(Family):
    """What is the same for all of them."""

    shared_vocabulary = True
    _code_token_ids: torch.Tensor | None = None

    @property
    def code_token_ids(self) -> torch.Tensor:
        """The word of each code, (K,), where the embeddings are."""
        if self._code_token_ids is None or self._code_token_ids.device != self.device:
            self._code_token_ids = self.base.model.vocabulary_mapping.img2bpe_mapping_tensor.long().to(self.device)
        return self._code_token_ids

    def read_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.embed_codes(self.dense_codes(pixel_values))

    @abstractmethod
    def encoded_codes(self, encoded) -> list[torch.Tensor]:
        """What the base's `get_image_features` returned for N images -> the codes of each, N times (H, W)."""

    @property
    def codebook(self) -> torch.Tensor:
        return weight_of(self.base.model.vqmodel.quantize.embedding).detach().float()

    def embed_codes(self, codes: torch.Tensor) -> torch.Tensor:
        return self.base.get_input_embeddings()(self.code_token_ids[codes])

    def code_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The words' own head, where it stands for codes: only an image's words can be drawn where an image is due."""
        weight = weight_of(self.base.lm_head)
        words = weight[self._run] if self._run is not None else weight[self.code_token_ids]  # a slice copies nothing
        return F.linear(hidden.to(weight.dtype), words)

    @cached_property
    def _run(self) -> slice | None:
        """Where the codes' words stand in one run and in order."""
        words = self.base.model.vocabulary_mapping.img2bpe_mapping_tensor.tolist()
        run = slice(words[0], words[0] + len(words))
        return run if words == list(range(run.start, run.stop)) else None
