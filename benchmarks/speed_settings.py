"""What the cases of `bench speed` are given, and what they give."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .turns import Clock, Ratio


@dataclass(frozen=True)
class Settings:
    """How to measure: `budget` is the seconds of turns that a comparison may take."""

    quick: bool
    budget: float
    clock: Clock
    models: Path
    end: float = math.inf
    """When no comparison may begin any more, by time.perf_counter."""
    large: bool = False
    """Whether to measure what takes minutes, too."""

    @property
    def is_over(self) -> bool:
        return time.perf_counter() > self.end

    @property
    def device(self) -> torch.device:
        return self.clock.device


@dataclass(frozen=True)
class Told:
    """A line for whoever reads."""

    line: str


@dataclass(frozen=True)
class Skipped:
    """A comparison that was not made, and why."""

    case: str
    why: str


Outcome = Ratio | Told | Skipped
Case = Callable[[Settings], Iterator[Outcome]]
