"""Ratios of times from interleaved runs (ours, theirs, theirs, ours), so that other load slows both sides."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Elapsed seconds, or CPU seconds of this process: the latter for one thread on a shared machine."""

Run = Callable[[], Any]

UNITS = {"ms": 1e3, "MB": 1e-6}
"""Printed unit -> factor from seconds or bytes."""


@dataclass(frozen=True)
class Ratio:
    """Theirs over ours: median, least and greatest over turns; medians of both sides, in s or bytes."""

    case: str
    ratio: float
    low: float
    high: float
    turns: int
    ours: float
    theirs: float
    note: str = ""
    unit: str = "ms"

    def format(self, value: float) -> str:
        """A side's value in the unit."""
        return f"{UNITS[self.unit] * value:.1f} {self.unit}"

    def lines(self) -> str:
        """A line to read and the line that scripts look for."""
        times = f"{self._padded(self.ours)}, theirs {self._padded(self.theirs)}"
        spread = f"{self.low:.2f} to {self.high:.2f}, {self.turns} turns"
        note = f"; {self.note}" if self.note else ""
        return f"{self.case}: ours {times} ({spread}{note})\nratio {self.case} {self.ratio:.3f}"

    def _padded(self, value: float) -> str:
        return f"{UNITS[self.unit] * value:10.2f} {self.unit}"


@dataclass(frozen=True)
class Clock:
    """Which clock times a run, and which device must be synchronized around it."""

    kind: str = "wall"
    device: torch.device = torch.device("cpu")

    def seconds(self, run: Run) -> float:
        self._synchronize()
        start = CLOCKS[self.kind]()
        run()
        self._synchronize()
        return CLOCKS[self.kind]() - start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Effort:
    """How long to compare: turns until `budget` seconds have passed, `at_least` so many; `warm` skips the
    warm-up run of either side.
    """

    budget: float
    at_least: int = 2
    warm: bool = False


def compare(case: str, ours: Run, theirs: Run, clock: Clock, effort: Effort, note: str = "") -> Ratio:
    """The ratio over interleaved turns of two runs of each side, after a warm-up run of each."""
    if not effort.warm:
        ours(), theirs()
    end = time.perf_counter() + effort.budget
    turns: list[tuple[float, float]] = []
    while len(turns) < effort.at_least or time.perf_counter() < end:
        first, second, third, fourth = (clock.seconds(run) for run in (ours, theirs, theirs, ours))
        turns.append(((first + fourth) / 2, (second + third) / 2))
    ratios = [their / our for our, their in turns]
    medians = [statistics.median(side) for side in zip(*turns, strict=True)]
    return Ratio(case, statistics.median(ratios), min(ratios), max(ratios), len(turns), *medians, note)
