"""Processes of their own: forks, since to import torch anew costs seconds; and a fresh interpreter, where its hashes matter."""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

FORK = multiprocessing.get_context("fork")


def start(task, *args):
    """Runs a task in a fork with one thread: torch's others do not survive it."""

    def run():
        torch.set_num_threads(1)
        task(*args)

    process = FORK.Process(target=run)
    process.start()
    return process


def exit_code(task, *args) -> int:
    """How a fork ends that runs a task; the negative number of the signal that killed it."""
    process = start(task, *args)
    process.join()
    return process.exitcode


def run_elsewhere(task, *args):
    """What a function of a module returns in another interpreter, with arguments that can be pickled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("PYTHONHASHSEED", "7")  # not as here
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(task, *args).result()
