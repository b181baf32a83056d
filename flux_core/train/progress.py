"""The progress line of a training: step, time left, smoothed losses."""

from __future__ import annotations

import sys
import time


class Smooth:
    """Values by name, averaged over about the last hundred updates."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def update(self, values: dict[str, float]) -> None:
        for name, new in values.items():
            self.values[name] = 0.99 * self.values.get(name, new) + 0.01 * new

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.4f}" for name, value in self.values.items())


class ProgressLine:
    """One line on standard error, updated every second on a terminal, else every ten seconds."""

    def __init__(self, total: int, start: int = 0) -> None:
        self.total, self.start = total, start
        self.began = self.shown = time.monotonic()
        self.on_terminal = sys.stderr.isatty()
        self.every = 1.0 if self.on_terminal else 10.0
        self.width = 0

    def per_second(self, step: int) -> float:
        """Steps per second since this line began."""
        return (step - self.start) / max(self.seconds(), 1e-9)

    def seconds(self) -> float:
        """Seconds since this line began."""
        return time.monotonic() - self.began

    def update(self, step: int, note: str = "") -> None:
        """Show `step` of `total` and `note`, unless the last update was a moment ago."""
        now = time.monotonic()
        if now - self.shown < self.every and step < self.total:
            return
        self.shown = now
        done = max(step - self.start, 1)
        left = (now - self.began) / done * (self.total - step)
        bar = "#" * (24 * step // max(self.total, 1))
        text = f"[{bar:<24}] {step}/{self.total}  {left / 60:5.1f} min left  {note}"
        end = "\r" if self.on_terminal and step < self.total else "\n"
        sys.stderr.write(f"{text:<{self.width}}{end}")  # spaces overwrite what a longer line left
        sys.stderr.flush()
        self.width = len(text) if self.on_terminal else 0
