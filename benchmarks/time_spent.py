"""Where a step's time goes, part by part, and how far each part is from its lower bound here.

    python3 run.py bench time-spent [--quick] [--cases miniature,full] [--dtype fp32|bf16] [--seconds 20]
                                    [--device cpu|cuda] [--threads N] [--clock wall|cpu] [--models DIR]
                                    [--figure FILE] [--json FILE]

Cases: the shipped miniature at 128 px; 1 double and 2 single blocks at FLUX.1's width, 256 px, 512 text
tokens and random weights, on CUDA all of FLUX.1 [dev] at 1024 px. The columns:

  ms        the time of a part's operations in a step as torch.profiler measures it (on CUDA: of their
            kernels), in the fastest of several runs
  share     of the step's time, which is measured without the profiler
  floor     lower bound in ms: for linear layers and attention their FLOP over the rate of the fastest matmul
            of torch in the dtype on this machine; for elementwise parts their bytes, each input read and each
            output written once, over the rate of a copy as large as the largest activation. Copies,
            operations of no part (other) and the time between operations have none
  x floor   the part's time over its floor

A GELU, norm or residual inside another operation takes no time and has no floor. Each table ends in

  floor_share CASE N     the sum of the floors over the step's time: 1 would be the hardware's limit

and the last line has the same over all cases, floor_share N. With --clock cpu times are this process's CPU
seconds, and each operation is timed separately instead of by torch.profiler, which only measures wall time:
for one thread on a shared machine.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from ..flux_core.backends.cpu_pack import pack_weights
from ..flux_core.model.spec import FLUX_DEV
from ..flux_core.model.transformer import FluxTransformer
from ..flux_core.weights import load_transformer
from .floors import QUICK_SIDES, bandwidth, matmul_rate, step_bytes, step_flop
from .interleaved import CLOCKS, Clock, Run
from .report import add_json, parser_of, writable, write_report
from .speed_inputs import FULL, MINIATURE, QUICK, Inputs, random_model
from .speed_settings import Settings, Skipped, add_options, prepare_clock
from .step_parts import OTHER, OVERHEAD, PARTS, Part, StepTime, by_context, draw_bars, part_of

NEEDS = "test"  # the part of run.py's environment that has diffusers, which the random models' file imports
ROOT = Path(__file__).resolve().parents[1]
CASES = ("miniature", "full")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def miniature(settings: Settings, dtype: torch.dtype) -> tuple[str, FluxTransformer, Inputs]:
    """mini-dev at 128 px. Raises ValueError where its file is missing."""
    file = settings.models / MINIATURE
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    model = load_transformer(file, dtype, settings.device)
    return "miniature-128", model, Inputs(model, 128, 32)


def full(settings: Settings, dtype: torch.dtype) -> tuple[str, FluxTransformer, Inputs]:
    """Blocks at FLUX.1's width, on CUDA the whole of FLUX.1 [dev]; random weights."""
    spec, side, text_tokens = FULL, 256, 512
    if settings.quick:
        spec, side, text_tokens = QUICK, 64, 16
    elif settings.device.type == "cuda":
        spec, side = FLUX_DEV, 1024
    model = random_model(spec, dtype, settings.device)
    return f"full-{side}", model, Inputs(model, side, text_tokens)


def cases(names: Sequence[str], settings: Settings, dtype: torch.dtype) -> Iterator[StepTime | Skipped]:
    """The measured step of each case."""
    for name in names:
        try:
            case, model, inputs = {"miniature": miniature, "full": full}[name](settings, dtype)
        except ValueError as error:
            yield Skipped(name, str(error))
            continue
        pack_weights(model)
        yield measure(case, model, inputs, settings)


@torch.no_grad()
def measure(case: str, model: FluxTransformer, inputs: Inputs, settings: Settings) -> StepTime:
    """The parts of a step with their times and floors."""
    run = inputs.our_step(model)
    for _ in range(2):
        run()
    whole, operations = fastest(run, settings)
    return divide(case, whole, operations, floors(model, inputs, settings))


def divide(case: str, whole: float, operations: dict[str, float], bounds: dict[str, float]) -> StepTime:
    """A step of `whole` seconds divided into its parts; time outside of operations is overhead.

    Operations whose sum exceeds the step, because profiling costs time itself, are scaled down to it.
    """
    scale = min(1.0, whole / sum(operations.values()))
    parts, other = dict.fromkeys(PARTS, 0.0), Counter[str]()
    for name, seconds in operations.items():
        parts[part_of(name)] += scale * seconds
        if part_of(name) == OTHER:
            other[name] += scale * seconds
    parts[OVERHEAD] = whole - sum(took for name, took in parts.items() if name != OVERHEAD)
    rows = [Part(name, took, bounds.get(name, 0.0) if took else 0.0) for name, took in parts.items()]
    return StepTime(case, whole, tuple(rows), tuple(name for name, _ in other.most_common(6)))


def floors(model: FluxTransformer, inputs: Inputs, settings: Settings) -> dict[str, float]:
    """The lower bound in seconds of each part that has one, from this machine's rates."""
    clock = settings.clock
    rows, _, h, w = inputs.noise.shape
    spec, tokens = model.spec, (inputs.prompt.txt.shape[1], h * w // 4)
    flop, rate = (
        step_flop(spec, *tokens, rows),
        matmul_rate(model.dtype, clock, QUICK_SIDES if settings.quick else None),
    )
    width = model.dtype.itemsize
    copied = bandwidth(rows * sum(tokens) * spec.mlp_size * width, clock)
    moved = step_bytes(spec, *tokens, width)
    elementwise = {name: rows * count / copied for name, count in moved.items()}
    return {"linear layers": flop.linear / rate, "attention": flop.attention / rate, **elementwise}


def fastest(run: Run, settings: Settings) -> tuple[float, dict[str, float]]:
    """Seconds of a run, and of its operations by name: each of the fastest of several runs.

    Runs with and without timed operations are interleaved.
    """
    whole: list[float] = []
    operations: list[dict[str, float]] = []
    end = time.perf_counter() + settings.budget
    while len(whole) < 3 or time.perf_counter() < end:
        whole.append(settings.clock.seconds(run))
        took = Counter[str]()
        for name, seconds in by_context(list(operations_of(run, settings.clock))):
            took[name] += seconds
        operations.append(dict(took))
    return min(whole), min(operations, key=lambda took: sum(took.values()))


def operations_of(run: Run, clock: Clock) -> Iterator[tuple[str, float]]:
    """Each operation of a run, in order, with its seconds outside of the operations that it calls."""
    if CLOCKS[clock.kind] is not time.perf_counter and clock.device.type == "cpu":
        with OperationTimer(clock.kind) as timer:
            run()
        return iter(timer.took)
    return profiled(run, clock)


class OperationTimer(TorchDispatchMode):
    """Times each operation by a clock that torch.profiler does not support."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.took: list[tuple[str, float]] = []
        self._now = CLOCKS[kind]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = self._now()
        result = func(*args, **(kwargs or {}))
        self.took.append((func.name(), self._now() - start))
        return result


def profiled(run: Run, clock: Clock) -> Iterator[tuple[str, float]]:
    """Each operation with its own seconds by torch.profiler, on CUDA those of its kernels."""
    on_cuda = clock.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with silenced_stderr(), profile(activities=activities, acc_events=True) as profiler:
        clock.seconds(run)
    for event in sorted(profiler.events(), key=lambda event: event.time_range.start):
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel, counted with the operation that launched it
        yield event.name, 1e-6 * (event.self_device_time_total if on_cuda else event.self_cpu_time_total)


@contextmanager
def silenced_stderr() -> Iterator[None]:
    """Discard what is written to file descriptor 2: the profiler's C++ library logs there at each use."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def main(argv: list[str]) -> int:
    """Print a table for each case; the exit code, 1 where no case could be measured."""
    parser = parser_of("time-spent", __doc__)
    add_options(parser, CASES)
    parser.add_argument("--dtype", choices=list(DTYPES), help="default fp32, on CUDA bf16")
    parser.add_argument("--seconds", type=float, default=20.0, help="for the runs of a case (20)")
    parser.add_argument("--figure", type=writable, metavar="FILE", help="draw the parts to this image")
    add_json(parser)
    arguments = parser.parse_args(argv)
    clock = prepare_clock(parser, arguments)
    budget = 0.0 if arguments.quick else arguments.seconds
    settings = Settings(arguments.quick, budget, clock, arguments.models)
    dtype = arguments.dtype or ("bf16" if arguments.device == "cuda" else "fp32")
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), {arguments.clock} clock, {dtype}")
    found = list(print_each(cases(arguments.cases or CASES, settings, DTYPES[dtype])))
    return summarize(found, arguments)


def print_each(outcomes: Iterator[StepTime | Skipped]) -> Iterator[StepTime]:
    """The measured steps; every outcome is printed as it comes."""
    for outcome in outcomes:
        if isinstance(outcome, Skipped):
            print(f"skipped {outcome.case}: {outcome.reason}", flush=True)
        else:
            print(f"\n{outcome.lines()}", flush=True)
            yield outcome


def summarize(found: list[StepTime], arguments: argparse.Namespace) -> int:
    """Write the requested files, print the last line; the exit code."""
    if not found:
        return 1
    if arguments.figure is not None:
        draw_bars(found).save(arguments.figure)
    figures: list[dict[str, Any]] = [{**asdict(one), "floor_share": one.floor_share} for one in found]
    share = sum(one.floor for one in found) / sum(one.seconds for one in found)
    write_report(arguments, "time-spent", {"cases": figures, "floor_share": share})
    print(f"\nfloor_share {share:.3f}")
    return 0
