"""Progress of a load or decode in percent, seconds per step, and the sampler's report as text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from ..flux_core.sampling.solver import Report
from ..flux_core.sampling.step_cache import StepCache

NOTHING_SAMPLED = (
    "steps: 0\nevaluations of the model: 0\n"
    "nothing left to sample in these sigmas: the latent is returned unchanged"
)
"""The report of a run whose schedule has no step."""

SHOWN_FROM = 1 << 26
"""Work from which on a progress bar is shown, in bytes of a load or multiplications of a computation."""


def in_percent(on_percent: Callable[[int, int], Any]) -> Callable[[int, int], None]:
    """A callback for (done, total) that calls `on_percent` with (percent, 100), each percent once.

    Nothing is called for totals below SHOWN_FROM.
    """
    latest = -1

    def report(done: int, total: int) -> None:
        nonlocal latest
        percent = 100 * done // max(1, total)
        if percent != latest and total >= SHOWN_FROM:
            latest = percent
            on_percent(percent, 100)

    return report


class Stopwatch:
    """Wraps a host's callback of every step; `seconds` are those of each step without the callback."""

    def __init__(self, callback: Callable[..., Any]) -> None:
        self._callback = callback
        self.seconds: list[float] = []
        self._since = time.perf_counter()

    def __call__(self, *args: Any) -> None:
        self.seconds.append(time.perf_counter() - self._since)
        self._callback(*args)
        self._since = time.perf_counter()


def skipped(caches: Iterable[StepCache]) -> tuple[int, int] | None:
    """How many passes the step caches of a run skipped, and of how many; None without a cache."""
    caches = list(caches)
    if not caches:
        return None
    count = sum(cache.skipped for cache in caches)
    return count, count + sum(cache.computed for cache in caches)


def report_text(
    report: Report,
    seconds: list[float],
    cached: tuple[int, int] | None = None,
    attention: str | None = None,
) -> str:
    """One "name: value" line per measurement; "unknown" where a solver does not provide it."""
    steps, error, straightness = str(report.accepted), "unknown", "unknown"
    if report.rejected:
        steps += f" accepted, {report.rejected} rejected"
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
        lines.append(f"seconds per step: {mean:.3f} ({min(seconds):.3f} to {max(seconds):.3f})")
        lines.append(f"seconds in total: {sum(seconds):.2f}")
    return "\n".join(lines)
