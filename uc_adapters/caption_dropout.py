"""Caption dropout: some drawing prompts lose their text, so the model also learns the unconditional case for guidance."""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch.utils.data import get_worker_info

from .errors import InputError


class CaptionDropout:
    """Chooses a share of the prompts to drop; the choice changes with every epoch.

    The choice depends on what is known of a prompt and on `epoch` alone. So a trainer that sets `epoch` drops the same prompts,
    however the rows are batched, split among processes and workers, or resumed. If no trainer sets it, a new epoch begins when
    a prompt comes a second time.

    Args:
        share: The share of prompts to drop, from 0 to 1.

    Raises:
        InputError: `share` is outside [0, 1].
    """

    def __init__(self, share: float):
        if not 0 <= share <= 1:
            raise InputError(f"caption_dropout={share}; expected a share from 0 to 1.")
        self.share = share
        # Data loader workers hold copies of this object, and persistent ones outlive an epoch, so the epoch is in shared memory
        self._epoch = torch.full((), -1).share_memory_()
        self._counted, self._seen = 0, set()

    @property
    def epoch(self) -> int | None:
        """The epoch that a trainer has set, or None."""
        return int(self._epoch) if self._epoch >= 0 else None

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def drops(self, prompt: bytes) -> bool:
        """Returns whether to drop a prompt: its text, the content of the image to draw, and the row's occurrence."""
        if self.epoch is None:
            self._count(prompt)
        if not self.share:
            return False
        digest = blake2b(f"{self.now} ".encode() + prompt, digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64 < self.share

    @property
    def now(self) -> str:
        """The epoch that a trainer has set; else the counted one and the worker's seed, since each worker counts for itself."""
        if self.epoch is not None:
            return str(self.epoch)
        worker = get_worker_info()
        return f"{self._counted} {worker.seed if worker else ''}"

    def _count(self, prompt: bytes) -> None:
        key = blake2b(prompt, digest_size=8).digest()
        if key in self._seen:
            self._counted += 1
            self._seen.clear()
        self._seen.add(key)
