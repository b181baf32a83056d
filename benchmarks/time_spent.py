"""Where a step's time goes, part by part, and how far each part is from its floor here.

    python3 run.py bench time-spent [--quick] [--cases miniature,full] [--dtype fp32|bf16] [--seconds 20]
                                    [--device cpu|cuda] [--threads N] [--clock wall|cpu] [--models DIR]
                                    [--figure FILE] [--json FILE]

Cases: the shipped miniature at 128 px; 1 double and 2 single blocks of FLUX.1's width at 256 px with 512 text
tokens and random weights, on CUDA all of FLUX.1 [dev] at 1024 px. The columns:

  ms        the time of a part's operations in a step, as torch.profiler has it (on CUDA: of their kernels),
            in the quickest of several runs
  share     of the step's time, which is measured without the profiler
  floor     ms that the part would take at best: linear layers and attention their FLOP over the rate of the
            fastest matrix product that torch does here in the dtype; elementwise parts their bytes, each
            input read and each output written once, over the rate of a copy as large as the largest
            activation. Copies, what no part claims (other) and the time between operations have none
  x floor   the part's time over its floor

A GELU, norm or residual within another operation takes no time and has no floor. Each table ends in

  floor_share CASE N     the sum of the floors over the step's time: 1 would be the hardware's limit

and the last line has the same over all cases, floor_share N. With --clock cpu times are those that this
process computes, and the operations are timed one by one instead of by torch.profiler, which knows the
wall's clock only: for one thread on a machine that others use.
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
from .floors import bandwidth, matmul_rate, step_bytes, step_flop
from .interleaved import CLOCKS, Clock, Run
from .report import add_json, parser_of, writable, write_report
from .speed_inputs import FULL, MINIATURE, QUICK, Inputs, random_model
from .speed_settings import Settings, Skipped, add_options, clock_of
from .step_parts import OTHER, OVERHEAD, PARTS, Part, Spent, draw_bars, part_of, with_gelu

NEEDS = "test"  # the part of run.py's environment that has diffusers, which the random models' file imports
ROOT = Path(__file__).resolve().parents[1]
CASES = ("miniature", "full")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def miniature(settings: Settings, dtype: torch.dtype) -> tuple[str, FluxTransformer, Inputs]:
    """Raises ValueError where there is none."""
    file = settings.models / MINIATURE
    if not file.is_file():
        raise ValueError(f"there is no {file}")
    model = load_transformer(file, dtype, settings.device)
    return "miniature-128", model, Inputs(model, 128, 32)


def full(settings: Settings, dtype: torch.dtype) -> tuple[str, FluxTransformer, Inputs]:
    spec, side, length = FULL, 256, 512
    if settings.quick:
        spec, side, length = QUICK, 64, 16
    elif settings.device.type == "cuda":
        spec, side = FLUX_DEV, 1024
    model = random_model(spec, dtype, settings.device)
    return f"full-{side}", model, Inputs(model, side, length)


def cases(names: Sequence[str], settings: Settings, dtype: torch.dtype) -> Iterator[Spent | Skipped]:
    """Where the time of each case goes."""
    for name in names:
        try:
            case, model, inputs = {"miniature": miniature, "full": full}[name](settings, dtype)
        except ValueError as error:
            yield Skipped(name, str(error))
            continue
        pack_weights(model)
        yield spent(case, model, inputs, settings)


@torch.no_grad()
def spent(case: str, model: FluxTransformer, inputs: Inputs, settings: Settings) -> Spent:
    """The parts of a step with their times and floors."""
    run = inputs.our_step(model)
    for _ in range(2):
        run()
    whole, operations = timed(run, settings)
    return divided(case, whole, operations, floors(model, inputs, settings.clock))


def divided(case: str, whole: float, operations: dict[str, float], least: dict[str, float]) -> Spent:
    """A step of `whole` seconds by its parts; what the operations leave of it is overhead.

    Operations that would take longer than the step, for the profiler costs time itself, are scaled to it.
    """
    scale = min(1.0, whole / sum(operations.values()))
    parts, other = dict.fromkeys(PARTS, 0.0), Counter[str]()
    for name, seconds in operations.items():
        parts[part_of(name)] += scale * seconds
        if part_of(name) == OTHER:
            other[name] += scale * seconds
    parts[OVERHEAD] = whole - sum(took for name, took in parts.items() if name != OVERHEAD)
    rows = [Part(name, took, least.get(name, 0.0) if took else 0.0) for name, took in parts.items()]
    return Spent(case, whole, tuple(rows), tuple(name for name, _ in other.most_common(6)))


def floors(model: FluxTransformer, inputs: Inputs, clock: Clock) -> dict[str, float]:
    """The least seconds of each part that has a floor, by what this machine does."""
    rows, _, h, w = inputs.noise.shape
    spec, tokens = model.spec, (inputs.prompt.txt.shape[1], h * w // 4)
    flop, rate = step_flop(spec, *tokens, rows), matmul_rate(model.dtype, clock)
    width = model.dtype.itemsize
    copied = bandwidth(rows * sum(tokens) * spec.mlp_size * width, clock)
    moved = step_bytes(spec, *tokens, width)
    least = {name: rows * count / copied for name, count in moved.items()}
    return {"linear layers": flop.linear / rate, "attention": flop.attention / rate, **least}


def timed(run: Run, settings: Settings) -> tuple[float, dict[str, float]]:
    """Seconds of a run, and by name those of its operations: either of the quickest of several runs, since
    all else that the machine does only adds. Runs with and without timed operations take turns.
    """
    plain: list[float] = []
    operations: list[dict[str, float]] = []
    end = time.perf_counter() + settings.budget
    while len(plain) < 3 or time.perf_counter() < end:
        plain.append(settings.clock.seconds(run))
        took = Counter[str]()
        for name, seconds in with_gelu(list(operations_of(run, settings.clock))):
            took[name] += seconds
        operations.append(dict(took))
    return min(plain), min(operations, key=lambda took: sum(took.values()))


def operations_of(run: Run, clock: Clock) -> Iterator[tuple[str, float]]:
    """Each operation of a run, in order, with the seconds that none of those that it calls takes."""
    if CLOCKS[clock.kind] is not time.perf_counter and clock.device.type == "cpu":
        with Timing(clock.kind) as timing:
            run()
        return iter(timing.took)
    return profiled(run, clock)


class Timing(TorchDispatchMode):
    """Times each operation itself, for a clock that torch.profiler does not know."""

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
    """As torch.profiler has it; on CUDA the seconds of the kernels that each launches, and Triton's kernels,
    which no operation launches.
    """
    on_cuda = clock.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with unheard(), profile(activities=activities, acc_events=True) as profiler:
        clock.seconds(run)
    for event in sorted(profiler.events(), key=lambda event: event.time_range.start):
        kernel = event.device_type != torch.autograd.DeviceType.CPU
        if kernel and part_of(event.name) == OTHER:
            continue  # counted with the operation that launched it
        yield event.name, 1e-6 * (event.self_device_time_total if on_cuda else event.self_cpu_time_total)


@contextmanager
def unheard() -> Iterator[None]:
    """Without the lines that the profiler's library writes to standard error, past Python, at each use."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def main(argv: list[str]) -> int:
    """Print a table for each case; 0, or 1 where there was none to measure."""
    parser = parser_of("time-spent", __doc__)
    add_options(parser, CASES)
    parser.add_argument("--dtype", choices=list(DTYPES), help="fp32, on CUDA bf16")
    parser.add_argument("--seconds", type=float, default=20.0, help="for the runs of a case (20)")
    parser.add_argument("--figure", type=writable, metavar="FILE", help="draw the parts into this picture")
    add_json(parser)
    arguments = parser.parse_args(argv)
    clock = clock_of(parser, arguments)
    budget = 0.0 if arguments.quick else arguments.seconds
    settings = Settings(arguments.quick, budget, clock, arguments.models)
    form = arguments.dtype or ("bf16" if arguments.device == "cuda" else "fp32")
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), {arguments.clock} clock, {form}")
    return told(list(shown(cases(arguments.cases or CASES, settings, DTYPES[form]))), arguments)


def shown(outcomes: Iterator[Spent | Skipped]) -> Iterator[Spent]:
    """Those measured; all are printed as they come."""
    for outcome in outcomes:
        if isinstance(outcome, Skipped):
            print(f"skipped {outcome.case}: {outcome.why}", flush=True)
        else:
            print(f"\n{outcome.lines()}", flush=True)
            yield outcome


def told(found: list[Spent], arguments: argparse.Namespace) -> int:
    """The files that were asked for and the last line."""
    if not found:
        return 1
    if arguments.figure is not None:
        draw_bars(found).save(arguments.figure)
    figures: list[dict[str, Any]] = [{**asdict(one), "floor_share": one.floor_share} for one in found]
    share = sum(one.floor for one in found) / sum(one.seconds for one in found)
    write_report(arguments, "time-spent", {"cases": figures, "floor_share": share})
    print(f"\nfloor_share {share:.3f}")
    return 0
