"""Measures seconds and bytes of functions that take turns, and the time in the parts of a model."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

Work = Callable[[], object]
PROC = Path("/proc/self")


@dataclass
class Measured:
    """Median seconds, and the peak memory of a turn beyond what was held before it, in bytes (None: unknown)."""

    seconds: float
    peak_bytes: int | None


def in_turn(works: dict[str, Work], repeats: int, what: str, warm_up: bool = True) -> dict[str, Measured | None]:
    """Measures works in turn, after a warm-up. A work that runs out of memory drops out, and its result is None."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    peaks: dict[str, list[int | None]] = {name: [] for name in works}
    fits = set(works)
    for turn, name in tqdm(list(product(range(repeats + warm_up), works)), desc=what):
        if name not in fits:
            continue
        before = held_bytes()
        taken = fitting(partial(seconds_of, works[name]))
        if taken is None:
            fits.remove(name)
        elif turn >= warm_up:
            seconds[name].append(taken)
            peaks[name].append(None if before is None else max(0, most_bytes() - before))
    return {
        name: Measured(statistics.median(seconds[name]), None if None in peaks[name] else max(peaks[name]))
        if name in fits
        else None
        for name in works
    }


def fitting(work: Work) -> object | None:
    """What `work` returns; None if memory runs out, after freeing it."""
    try:
        return work()
    except (MemoryError, torch.OutOfMemoryError):
        pass
    except RuntimeError as error:  # PyTorch's CPU allocator has no error class of its own
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
    gc.collect()  # outside the handler, because the error holds what was allocated so far
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return None


def fitting_batch(work: Work, batch_size: int) -> Any:
    """What `work` returns; exits with a message about the batch size if memory runs out."""
    done = fitting(work)
    if done is None:
        raise SystemExit(f"--batch_size {batch_size} ran out of memory; expected one that fits. Choose a smaller one.")
    return done


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds_of(work: Work) -> float:
    """The wall-clock seconds of a work."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def held_bytes() -> int | None:
    """Memory in use: the GPU's, or the process's resident one (None: unknown). `most_bytes` counts from this call on."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that malloc keeps would hide as much of the next turn's need
        (PROC / "clear_refs").write_text("5")  # the kernel's high-water mark falls to what is resident now
    except OSError:
        return None
    return _resident("VmRSS")


def most_bytes() -> int:
    """The peak memory in use since `held_bytes`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else _resident("VmHWM")


def _resident(field: str) -> int:
    lines = (PROC / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


class Watch:
    """Measures the seconds inside named parts of a model. Time in a part inside another part counts for the inner one alone."""

    def __init__(self, parts: dict[str, list[nn.Module]]):
        self.parts, self.seconds = parts, defaultdict(float)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measures while the context is open."""
        handles, open_calls = [], []

        def start(*_) -> None:
            synchronize()
            open_calls.append(time.perf_counter())

        for name, modules in self.parts.items():

            def stop(*_, name=name) -> None:
                synchronize()
                taken = time.perf_counter() - open_calls.pop()
                self.seconds[name] += taken
                if open_calls:
                    open_calls[-1] += taken  # moves the start of the part around it, which excludes this call

            for module in modules:
                handles += [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
