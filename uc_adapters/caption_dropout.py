"""Caption dropout: which drawing prompts lose their words, so that classifier-free guidance has its unconditional model."""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch.utils.data import get_worker_info

from .errors import InputError


class CaptionDropout:
    """Drops a share of prompts, others in every epoch.

    The choice follows from a prompt's content and from `epoch`. A trainer that sets it thus drops the same prompts however
    rows are batched, shared among processes and workers, or resumed. Where nobody sets it, an epoch ends when a prompt comes
    back.

    Args:
        share: From 0 to 1.

    Raises:
        InputError: A share outside [0, 1].
    """

    def __init__(self, share: float):
        if not 0 <= share <= 1:
            raise InputError(f"caption_dropout={share}; expected a share from 0 to 1.")
        self.share = share
        # In shared memory: the workers of a data loader hold copies, and persistent ones outlive an epoch
        self._epoch = torch.full((), -1).share_memory_()
        self._counted, self._seen = 0, set()

    @property
    def epoch(self) -> int | None:
        """As a trainer set it; None where nobody did."""
        return int(self._epoch) if self._epoch >= 0 else None

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def drops(self, prompt: bytes) -> bool:
        """Whether a prompt is dropped, by its content and what is drawn for it."""
        if not self.share:
            return False
        epoch = self._counted_epoch(prompt) if self.epoch is None else f"{self.epoch} "
        digest = blake2b(epoch.encode() + prompt, digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64 < self.share

    def _counted_epoch(self, prompt: bytes) -> str:
        """The epoch by counting, and the worker's seed: each worker counts for itself, and new ones begin anew."""
        key = blake2b(prompt, digest_size=8).digest()
        if key in self._seen:
            self._counted += 1
            self._seen.clear()
        self._seen.add(key)
        worker = get_worker_info()
        return f"{self._counted} {worker.seed if worker else ''} "
