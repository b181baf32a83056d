"""What a run tells of itself: how far a load or decode is, the seconds of its steps, the report as text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from ..flux_core.sampling.solver import Report
from ..flux_core.sampling.step_cache import StepCache

SHOWN_FROM = 1 << 26
"""Bytes of a load from which on it has a bar; a smaller one is over before anyone could read it.

Of computing, multiplications: as many are over sooner still.
"""


def in_percent(tell: Callable[[int, int], Any]) -> Callable[[int, int], None]:
    """A listener to (done, in all) that tells a host (percent, 100), each percent once.

    Less than SHOWN_FROM in all is not told.
    """
    told = -1

    def report(done: int, total: int) -> None:
        nonlocal told
        percent = 100 * done // max(1, total)
        if percent != told and total >= SHOWN_FROM:
            told = percent
            tell(percent, 100)

    return report


class Stopwatch:
    """A host's callback of every step that also keeps `seconds`: each step's, less the callback's own."""

    def __init__(self, callback: Callable[..., Any]) -> None:
        self._callback = callback
        self.seconds: list[float] = []
        self._since = time.perf_counter()

    def __call__(self, *args: Any) -> None:
        self.seconds.append(time.perf_counter() - self._since)
        self._callback(*args)
        self._since = time.perf_counter()


def skipped(memories: Iterable[StepCache]) -> tuple[int, int] | None:
    """How many evaluations a cache has skipped, and of how many; None without a cache."""
    memories = list(memories)
    if not memories:
        return None
    gone = sum(memory.skipped for memory in memories)
    return gone, gone + sum(memory.computed for memory in memories)


def report_text(
    report: Report,
    seconds: list[float],
    cached: tuple[int, int] | None = None,
    attention: str | None = None,
) -> str:
    """A line for each figure; what a method does not give is said to be unknown."""
    steps, error, straightness = str(report.accepted), "unknown", "unknown"
    if report.rejected:
        steps += f" taken, {report.rejected} tried in vain"
    if report.error is not None:
        error = f"{report.error:.2g} (root mean square; the latent's values are about 1)"
    if report.straightness is not None:
        straightness = f"{report.straightness:.4f} in these steps (0: straight)"
    lines = [
        f"solver: {report.solver}",
        f"steps: {steps}",
        f"evaluations of the model: {report.evaluations}",
        f"estimated error: {error}",
        f"straightness of the path: {straightness}",
    ]
    if cached is not None:
        lines.insert(3, f"skipped by the step cache: {cached[0]} of {cached[1]} passes")
    if attention is not None:
        lines.append(f"attention: {attention}")
    if seconds:
        mean = sum(seconds) / len(seconds)
        lines.append(f"seconds a step: {mean:.3f} ({min(seconds):.3f} to {max(seconds):.3f})")
        lines.append(f"seconds in all: {sum(seconds):.2f}")
    return "\n".join(lines)
