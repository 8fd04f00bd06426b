"""Base and adapter draw one prompt in turns of one step of the language model, and each has a clock of its own.

They share a machine, so drawing at the same moment would slow both down. Whoever has computed for less time takes the next
step. So the page shows a race, and the seconds are those of each contender alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import torch
from PIL import Image
from scoring.contenders import Contender, draw, drawn_steps
from scoring.stock_calls import base_of

from uc_adapters import UniCompressModel
from uc_adapters.families import family_of


class Drawing:
    """One drawing, in a thread that halts after every step of the language model.

    Args:
        contender: Who draws. It must not do anything else meanwhile.
        prompt: What to draw.
        seed: Of the sampling.
        **sampling: Passed to `generate`.

    Attributes:
        steps: Steps of the language model that are done.
        total: Steps that the drawing takes.
        seconds: Time that was spent computing. Halts do not count.
        image: The picture, once it is there.
    """

    def __init__(self, contender: Contender, prompt: str, seed: int, **sampling):
        self.contender, self.total = contender, drawn_steps(contender)
        self.steps, self.seconds = 0, 0.0
        self.image: Image.Image | None = None
        self._error: Exception | None = None
        self._stopping = False
        self._may_go, self._halted = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._draw, args=(prompt, seed, sampling), name="drawing", daemon=True)
        self._thread.start()

    def advance(self) -> None:
        """Computes up to the end of the next step, or up to the picture.

        Raises:
            Exception: What the drawing failed for.
        """
        start = time.perf_counter()
        self._may_go.release()
        self._halted.acquire()
        self.seconds += time.perf_counter() - start
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Ends the drawing where it halts, and its thread."""
        self._stopping = True
        self._may_go.release()
        self._thread.join()

    def _draw(self, prompt: str, seed: int, sampling: dict) -> None:
        base = base_of(self.contender.model)
        language_model = base.get_submodule(family_of(base).module_names["language model"])
        hook = language_model.register_forward_hook(self._end_step)
        try:
            self._wait()
            if isinstance(self.contender.model, UniCompressModel):  # the base's `generate` takes no generator
                sampling = {**sampling, "generator": torch.Generator(base.device).manual_seed(seed)}
            else:
                torch.manual_seed(seed)
            (self.image,), _ = draw(self.contender, [prompt], **sampling)
        except _Stopped:
            pass
        except Exception as error:  # it is raised where somebody waits for the drawing
            self._error = error
        finally:
            hook.remove()
            self._halted.release()

    def _end_step(self, *_) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # else the other one's clock would run for this step
        self.steps += 1
        self._halted.release()
        self._wait()

    def _wait(self) -> None:
        self._may_go.acquire()
        if self._stopping:
            raise _Stopped


class _Stopped(Exception):  # noqa: N818  (it is no error)
    """Ends a drawing that nobody waits for."""


def race(pair: list[Contender], prompt: str, seed: int, interval: float = 0.1, **sampling) -> Iterator[list[Drawing]]:
    """Draws a prompt with every contender.

    Args:
        pair: The contenders.
        prompt: What to draw.
        seed: Of the sampling; every contender has the same.
        interval: Seconds between two yields. Default 0.1.
        **sampling: Passed to `generate`.

    Yields:
        The drawings as they are at that moment, and at last with their pictures. Closing the iterator ends them.
    """
    drawings = [Drawing(contender, prompt, seed, **sampling) for contender in pair]
    try:
        yield drawings
        shown = time.monotonic()
        while running := [drawing for drawing in drawings if drawing.image is None]:
            min(running, key=lambda drawing: drawing.seconds).advance()
            if time.monotonic() - shown > interval:
                yield drawings
                shown = time.monotonic()
        yield drawings
    finally:
        for drawing in drawings:
            drawing.stop()


def warm_up(contender: Contender) -> None:
    """Takes the first two steps of a drawing: a model's first ones also make what all later ones use."""
    drawing = Drawing(contender, "a red 3", 0)
    drawing.advance()
    drawing.advance()
    drawing.stop()
