"""Pieces of work in processes of their own: results in order, everything heard, a failure told."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
from rectiflux.benchmarks.side_by_side import Tell, cores, side_by_side


def count(number: int, tell: Tell) -> tuple[int, int]:
    for i in range(number):
        tell((number, i))
    return number, os.getpid()


def fail(tell: Tell) -> None:
    tell("before")
    raise ValueError("no such ring")


@pytest.mark.parametrize("processes", [1, 2])
def test_results_in_order_and_everything_heard(processes: int) -> None:
    """More than a pipe holds, too."""
    numbers, heard = (20_000, 3, 0, 700), list[Any]()
    found = side_by_side([partial(count, number) for number in numbers], processes, heard.append)
    assert tuple(number for number, _ in found) == numbers
    for number in numbers:
        assert [i for who, i in heard if who == number] == list(range(number))
    others = {process for _, process in found} - {os.getpid()}
    assert len(others) == 0 if processes == 1 else 1 <= len(others) <= 2


@pytest.mark.parametrize("processes", [1, 2])
def test_a_failure_is_that_of_the_job(processes: int) -> None:
    heard = list[Any]()
    with pytest.raises(ValueError, match="no such ring"):
        side_by_side([partial(count, 1), fail, *[partial(count, 2)] * 20], processes, heard.append)
    assert {(1, 0), "before"} <= set(heard)  # two processes are heard in any order
    assert processes == 2 or len(heard) == 2


def test_cores_are_those_that_this_process_may_use() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)
