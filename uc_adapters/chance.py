"""What a collator chooses by chance: which drawings lose their prompts, and at which of several ratios images are seen."""

from __future__ import annotations

from hashlib import blake2b
from random import Random

import torch
from torch.utils.data import get_worker_info


class Chance:
    """Makes choices that change with every epoch.

    A choice depends on what it is made for and on `epoch` alone. So a trainer that sets `epoch` gets the same choices, however
    the rows are batched, split among processes and workers, or resumed. If no trainer sets it, a new epoch begins when a row
    comes a second time, and each worker of a data loader counts for itself.
    """

    def __init__(self):
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

    def count(self, row: bytes) -> None:
        """Counts a row, by its content. To be called for all rows of a batch before a choice is made, if `epoch` is None."""
        key = blake2b(row, digest_size=8).digest()
        if key in self._seen:
            self._counted += 1
            self._seen.clear()
        self._seen.add(key)

    def happens(self, share: float, what: bytes) -> bool:
        """Returns whether something happens that happens in a share of all cases, from 0 to 1."""
        return share > 0 and int.from_bytes(self._digest(what), "big") / 2**64 < share

    def one_of(self, options: tuple[int, ...], what: bytes) -> int:
        """Returns one of several numbers, each as often as its size."""
        return Random(self._digest(f"{options} ".encode() + what)).choices(options, weights=options)[0]

    def _digest(self, what: bytes) -> bytes:
        if self.epoch is not None:
            now = str(self.epoch)
        else:
            worker = get_worker_info()
            now = f"{self._counted} {worker.seed if worker else ''}"
        return blake2b(f"{now} ".encode() + what, digest_size=8).digest()
