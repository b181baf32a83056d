"""What the cases of `bench speed` are given, and what they give."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .interleaved import CLOCKS, Clock, Ratio
from .report import positive

MODELS = Path(__file__).resolve().parents[1] / "models"


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


NO_BFLOAT16 = "this processor has no instructions for bfloat16, so that it takes many times fp32"


def knows_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself."""
    if device.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def add_options(parser: argparse.ArgumentParser, cases: Collection[str]) -> None:
    """What benchmarks of these settings are asked in common; `clock_of` makes the rest ready."""

    def names(text: str) -> list[str]:
        for name in text.split(","):
            if name not in cases:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(cases)}")
        return text.split(",")

    parser.add_argument("--quick", action="store_true", help="small models, few runs: does it run at all?")
    parser.add_argument("--cases", type=names, help=f"of {', '.join(cases)}; all of the device")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="what seconds are (wall)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (cpu)")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of the miniatures")


def clock_of(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Clock:
    """The clock that was asked for, once torch has its threads and seed; ends where there is no device."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, got none; leave it out to measure on the CPU")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    return Clock(arguments.clock, torch.device(arguments.device))
