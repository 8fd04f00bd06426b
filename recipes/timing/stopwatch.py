"""Seconds and bytes of what takes turns, and where in a model the time goes."""

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
    """Median seconds, and the most memory that a turn needed beyond what was held before it, in bytes (None: not known)."""

    seconds: float
    peak_bytes: int | None


def in_turn(works: dict[str, Work], repeats: int, what: str, warm_up: bool = True) -> dict[str, Measured | None]:
    """Each work's measures, taking turns, after a warm-up; None for a work that ran out of memory, which drops out."""
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
    """What work returns; None where memory runs out, which is then free again."""
    try:
        return work()
    except (MemoryError, torch.OutOfMemoryError):
        pass
    except RuntimeError as error:  # PyTorch's allocator of the CPU has no class of error of its own
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
    gc.collect()  # outside of the handler: the error held what was allocated so far
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return None


def fitting_batch(work: Work, batch_size: int) -> Any:
    """What work returns; stops with a word on the batch where memory runs out."""
    done = fitting(work)
    if done is None:
        raise SystemExit(f"--batch_size {batch_size} ran out of memory; expected one that fits. Take a smaller one.")
    return done


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds_of(work: Work) -> float:
    """Wall-clock seconds."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def held_bytes() -> int | None:
    """Memory in use, of the GPU, or the process's resident; `most_bytes` counts from here on. None: the system cannot tell."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed but kept would hide as much of the next turn's need
        (PROC / "clear_refs").write_text("5")  # the kernel's high-water mark falls to what is resident now
    except OSError:
        return None
    return _resident("VmRSS")


def most_bytes() -> int:
    """The most memory in use since `held_bytes`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else _resident("VmHWM")


def _resident(field: str) -> int:
    lines = (PROC / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


class Watch:
    """Seconds spent inside parts of a model, by name: what a part calls counts for it alone."""

    def __init__(self, parts: dict[str, list[nn.Module]]):
        self.parts, self.seconds = parts, defaultdict(float)

    @contextmanager
    def watching(self) -> Iterator[None]:
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
                    open_calls[-1] += taken  # not of the part around it

            for module in modules:
                handles += [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
