"""The parts of a benchmark. Each has a limit, and one that fails loses nothing that was measured before it."""

from __future__ import annotations

import json
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Parts:
    """Writes figures to a file after each part.

    Args:
        figures: The figures, which the parts fill in. Under "failed" are the parts that failed, with their errors.
        file: The JSON file. None writes none.
        limit: The seconds that a part may take. None sets no limit, and neither does a system without alarms (Windows).
    """

    def __init__(self, figures: dict, file: str | None = None, limit: float | None = None):
        self.figures, self.file, self.limit = figures, file, limit

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Runs the body as one part. An error in it is noted, and does not leave it."""
        try:
            with _limited(self.limit):
                yield
        except Exception as error:  # compilers and CUDA have error classes of their own
            traceback.print_exc()
            self.figures.setdefault("failed", {})[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        self.write()

    def write(self) -> None:
        """Writes the figures, if there is a file."""
        if self.file:
            Path(self.file).write_text(json.dumps(self.figures, indent=2) + "\n")


@contextmanager
def _limited(seconds: float | None) -> Iterator[None]:
    """Raises TimeoutError in the body once its time is over."""
    if seconds is None or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_) -> None:
        raise TimeoutError(f"it took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
