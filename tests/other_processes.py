"""Processes of their own at the price of a fork: their server imports what they need once, and computes nothing.

What runs in one is a function of a module, with arguments that can be pickled.
"""

import functools
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver

import pytest


@functools.cache
def server():
    """The context of such processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["two_processes"])  # which imports all that trains
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("PYTHONHASHSEED", "7")  # not as here
        forkserver.ensure_running()
    return context


def run_elsewhere(task, *args):
    """What a function returns in another process."""
    with ProcessPoolExecutor(1, server()) as pool:
        return pool.submit(task, *args).result()


def exit_code(task, *args) -> int:
    """How a process ends that runs a function; the negative number of the signal that killed it."""
    process = server().Process(target=task, args=args)
    process.start()
    process.join()
    return process.exitcode
