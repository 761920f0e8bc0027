"""Work in other processes, which end when this one does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def mapped(work: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
    """`work` on each task, as many at a time as there are cores; results as they come.

    `work` and the tasks go to new processes, so they must be importable and plain.
    """
    pool = ProcessPoolExecutor(
        min(len(tasks), cores()),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
    )
    try:
        for done in as_completed([pool.submit(work, task) for task in tasks]):
            yield done.result()
    except BaseException:
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """The cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def die_with_parent() -> None:
    """On Linux: SIGTERM when the parent dies, so that nothing goes on unseen."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches us all: the parent decides
    die_with_parent()
