"""Settings that the cases of `bench speed` receive, and the outcomes that they yield."""

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
    """How to measure: `budget` is the seconds of interleaved runs that one comparison may take."""

    quick: bool
    budget: float
    clock: Clock
    models: Path
    end: float = math.inf
    """The time, by time.perf_counter, after which no comparison may begin."""
    large: bool = False
    """Whether to include the cases that take minutes."""

    @property
    def is_time_up(self) -> bool:
        return time.perf_counter() > self.end

    @property
    def device(self) -> torch.device:
        return self.clock.device


@dataclass(frozen=True)
class Note:
    """A line of text beside the ratios."""

    text: str


@dataclass(frozen=True)
class Skipped:
    """A comparison that was not made, and the reason."""

    case: str
    reason: str


Outcome = Ratio | Note | Skipped
Case = Callable[[Settings], Iterator[Outcome]]

TIME_IS_UP = "the time is up"
NO_BFLOAT16 = "this processor has no bfloat16 instructions; bfloat16 takes many times as long as float32"


def supports_bfloat16(device: torch.device) -> bool:
    """Whether the device has bfloat16 instructions."""
    if device.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def add_options(parser: argparse.ArgumentParser, cases: Collection[str]) -> None:
    """Add the options that benchmarks with these settings share; `prepare_clock` applies them."""

    def names(text: str) -> list[str]:
        for name in text.split(","):
            if name not in cases:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(cases)}")
        return text.split(",")

    parser.add_argument("--quick", action="store_true", help="small models, few runs: does it run at all?")
    parser.add_argument("--cases", type=names, help=f"from {', '.join(cases)}; default: those of the device")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="wall or CPU seconds (wall)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (cpu)")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of the shipped models")


def prepare_clock(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Clock:
    """Set torch's threads and seed and return the clock; end the program where the device is missing."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, got none; leave it out to measure on the CPU")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    return Clock(arguments.clock, torch.device(arguments.device))
