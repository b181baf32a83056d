"""Ratios of times from interleaved runs: ours, theirs, theirs, ours, so that a busy machine slows both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Seconds that pass, or that this process computes: the second for one thread on a machine that is shared."""

Run = Callable[[], Any]

UNITS = {"ms": 1e3, "MB": 1e-6}
"""Of times in seconds and of bytes."""


@dataclass(frozen=True)
class Ratio:
    """Theirs over ours: a median over turns, with least and greatest; medians of both, in s or bytes."""

    case: str
    ratio: float
    low: float
    high: float
    turns: int
    ours: float
    theirs: float
    note: str = ""
    unit: str = "ms"

    def told(self, value: float) -> str:
        """One of both in the unit."""
        return f"{UNITS[self.unit] * value:.1f} {self.unit}"

    def lines(self) -> str:
        """For a person, and the line that scripts look for."""
        times = f"{self._padded(self.ours)}, theirs {self._padded(self.theirs)}"
        spread = f"{self.low:.2f} to {self.high:.2f}, {self.turns} turns"
        note = f"; {self.note}" if self.note else ""
        return f"{self.case}: ours {times} ({spread}{note})\nratio {self.case} {self.ratio:.3f}"

    def _padded(self, value: float) -> str:
        return f"{UNITS[self.unit] * value:10.2f} {self.unit}"


@dataclass(frozen=True)
class Clock:
    """How runs are timed: the clock, and on which device there is something to wait for."""

    kind: str = "wall"
    device: torch.device = torch.device("cpu")

    def seconds(self, run: Run) -> float:
        self._wait()
        start = CLOCKS[self.kind]()
        run()
        self._wait()
        return CLOCKS[self.kind]() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def compare(
    case: str, ours: Run, theirs: Run, clock: Clock, budget: float, note: str = "", *, warm: bool = False
) -> Ratio:
    """The ratio of as many turns as fit into `budget` seconds, at least two.

    A run of each goes before, unless both have run (`warm`).
    """
    if not warm:
        ours(), theirs()
    end = time.perf_counter() + budget
    turns: list[tuple[float, float]] = []
    while len(turns) < 2 or time.perf_counter() < end:
        first, other, another, last = (clock.seconds(run) for run in (ours, theirs, theirs, ours))
        turns.append(((first + last) / 2, (other + another) / 2))
    ratios = [their / our for our, their in turns]
    middle = [statistics.median(side) for side in zip(*turns, strict=True)]
    return Ratio(case, statistics.median(ratios), min(ratios), max(ratios), len(turns), *middle, note)
