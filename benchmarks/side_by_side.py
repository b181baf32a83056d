"""Independent pieces of a benchmark in processes of their own, heard in one."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from typing import Any, TypeVar

Result = TypeVar("Result")
Tell = Callable[[Any], None]
"""What a piece of work is given, to say how far it is."""

_told: Any = None
"""In a worker: the queue that leads to where the work was given out."""


def cores() -> int:
    """How many processors this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def side_by_side(jobs: Sequence[Callable[[Tell], Result]], processes: int, hear: Tell) -> list[Result]:
    """What each job gives, in order; `hear` is called here with all that they tell.

    Jobs and results must be picklable. With one process, or where none can be forked, all is done here.
    Raises what the first job that fails raises, once those that run have ended; the others are not begun.
    """
    if processes < 2 or "fork" not in multiprocessing.get_all_start_methods():
        return [job(hear) for job in jobs]
    context = multiprocessing.get_context("fork")
    told, failed = context.Queue(), list[Future[Result]]()
    with ProcessPoolExecutor(processes, context, _begin, (told,)) as pool:
        futures = [pool.submit(_work, job) for job in jobs]
        left = set(futures)
        while left and not failed:
            done, left = wait(left, timeout=0.2, return_when=FIRST_EXCEPTION)
            failed = [future for future in done if future.exception()]
            _hear_all(told, hear)
        pool.shutdown(cancel_futures=True)
    _hear_all(told, hear)
    return [future.result() for future in failed or futures]


def _hear_all(told: Any, hear: Tell) -> None:
    while not told.empty():
        hear(told.get())


def _begin(told: Any) -> None:
    global _told
    _told = told


def _work(job: Callable[[Tell], Result]) -> Result:
    return job(_told.put)
