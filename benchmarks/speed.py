"""Ours against diffusers, and ComfyUI where COMFYUI_PATH names it: ratios, within ten minutes.

    python3 run.py bench speed [--quick] [--cases miniature,full,int8,vae,pictures,png,threads,memory,fp8]
                               [--seconds 120] [--threads N] [--clock wall|cpu] [--device cpu|cuda]
                               [--models DIR] [--large] [--json FILE] [--record]

Both sides run eagerly on the same weights, inputs and dtype, and their runs are interleaved (ours, theirs,
theirs, ours), so that other load on the machine slows both. Each comparison ends in a line

  ratio CASE N     theirs over ours in time, a median over turns: above 1, ours is faster (memory: is less)

  miniature        8 steps at 128 px in fp32, including what is computed once a prompt; theirs does that at
                   each step
  full-DTYPE-SIDE  a step of 1 double and 2 single blocks at FLUX.1's width, 512 text tokens, random weights;
                   int8 against diffusers in bf16 (both only in fp32 where a processor would take minutes for
                   bf16). What we compute once a run is excluded, theirs computes it in each step
  int8             not timed: the error of an int8 layer on random and on outlier-heavy weights
  vae-..., text-encode, whole-picture, load, first-picture     decode and encode at full width, the rest with
                   the shipped miniature; vae-...-fp32 is ours in bf16 against diffusers in fp32
  png-SIDE         [schnell] in 4 steps, from a prompt to the bytes of a PNG: the miniature, with
                   --device cuda full size with random weights, T5-XXL and CLIP-L
  threads-...      ours with OMP_WAIT_POLICY=PASSIVE, which run.py sets, against the default: the demo and
                   blocks at FLUX.1's width, idle and beside a spinning process on each core but one
  memory-...       peak bytes above the weights of a step and a decode at 512 px and of an image by the
                   miniature, each side in its own process. --large adds our decode at 2048 px: minutes
  fp8              not timed: the error of mini-dev's velocity when one kind of layer computes in fp8
  gpu              with --device cuda, and first there: FLUX.1 [dev] (28 steps) and [schnell] (4) in full
                   size with random weights at 512 and 1024 px, batch 1 and 4, bf16 and fp8, against
                   diffusers eager and compiled, and our FLOP rate beside that of a matmul. Of long loops a
                   few steps are measured ("28 steps from 3")

--clock cpu counts this process's CPU seconds: for one thread on a shared machine. Skipped cases are printed
with the reason, among them those for which no time is left. --record appends the ratios to
benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from . import speed_blocks, speed_fp8, speed_gpu, speed_memory, speed_models, speed_png, speed_threads
from .interleaved import Ratio
from .report import add_json, machine, parser_of, write_report
from .speed_settings import TIME_IS_UP, Case, Note, Settings, Skipped, add_options, prepare_clock

NEEDS = "test"  # the part of run.py's environment that has diffusers
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
LIMIT = 420.0  # seconds after which no comparison begins
COMPARISONS = 12  # roughly, that share the seconds of --seconds

CASES: dict[str, Case] = {
    "miniature": speed_blocks.miniature,
    "full": speed_blocks.full_width,
    "int8": speed_blocks.int8_error,
    "vae": speed_models.autoencoder,
    "pictures": speed_models.images,
    "png": speed_png.png,
    "threads": speed_threads.threads,
    "memory": speed_memory.memory,
    "fp8": speed_fp8.fp8_error,
    "gpu": speed_gpu.full_size,
}
BY_DEFAULT = {
    "cpu": [name for name in CASES if name != "gpu"],
    "cuda": ["gpu", "png", "vae", "memory", "miniature", "full", "pictures"],
}
"""Cases of a device, in the order in which they get their share of the time."""


@dataclass
class Results:
    """The outcomes of all cases."""

    ratios: list[Ratio] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def measure(names: list[str], settings: Settings) -> Results:
    """Run cases and print each outcome as it comes."""
    results = Results()
    for name in names:
        case = CASES[name](settings) if not settings.is_time_up else iter([Skipped(name, TIME_IS_UP)])
        for outcome in case:
            if isinstance(outcome, Ratio):
                results.ratios.append(outcome)
                print(outcome.lines(), flush=True)
            elif isinstance(outcome, Note):
                results.notes.append(outcome.text)
                print(outcome.text, flush=True)
            else:
                results.skipped.append(outcome)
                print(f"skipped {outcome.case}: {outcome.reason}", flush=True)
    return results


def section(results: Results, settings: Settings, today: datetime.date) -> str:
    """The section of RESULTS.md for one run."""
    on = machine()
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("diffusers", "transformers")
    )
    device = on["cuda"] if settings.device.type == "cuda" else f"{on['processor']}, {on['threads']} thread(s)"
    lines = [
        f"## {today.isoformat()}, {device}",
        "",
        f"torch {on['torch']}, {versions}, Python {on['python']}; {settings.clock.kind} clock",
        "",
        "| case | ratio | least to greatest | turns | ours | theirs | |",
        "|-|-|-|-|-|-|-|",
    ]
    lines += [
        f"| {r.case} | {r.ratio:.2f} | {r.low:.2f} to {r.high:.2f} | {r.turns} | {r.format(r.ours)} "
        f"| {r.format(r.theirs)} | {r.note} |"
        for r in results.ratios
    ]
    if results.notes:
        lines += ["", *(f"- {note}" for note in results.notes)]
    if results.skipped:
        lines += ["", *(f"- skipped {one.case}: {one.reason}" for one in results.skipped)]
    return "\n".join(lines) + "\n"


def record(text: str, file: Path) -> None:
    """Append a section to the file of results."""
    about = "Appended by the script (`--record`): theirs over ours, in time or memory."
    head = f"# Results of `bench speed`\n\n{about}\n"
    before = file.read_text(encoding="utf-8") if file.exists() else head
    file.write_text(f"{before.rstrip()}\n\n{text}", encoding="utf-8")


def main(argv: list[str]) -> int:
    """Run the cases and print their ratios; the exit code, 0."""
    parser = parser_of("speed", __doc__)
    add_options(parser, CASES)
    parser.add_argument("--seconds", type=float, default=120.0, help="for the runs of all cases (120)")
    parser.add_argument("--large", action="store_true", help="also the memory of a decode at 2048 px")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)  # subject of `memory`, and whose
    parser.add_argument("--record", action="store_true", help="append the ratios to benchmarks/RESULTS.md")
    add_json(parser)
    arguments = parser.parse_args(argv)
    clock = prepare_clock(parser, arguments)
    budget = 0.0 if arguments.quick else arguments.seconds / COMPARISONS
    end = time.perf_counter() + LIMIT
    settings = Settings(arguments.quick, budget, clock, arguments.models, end, arguments.large)
    if arguments.child:
        peak = speed_memory.above_weights(*arguments.child, settings)
        write_report(arguments, "speed", {"bytes": peak})
        return 0
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), {arguments.clock} clock", flush=True)
    with torch.no_grad():
        results = measure(arguments.cases or BY_DEFAULT[arguments.device], settings)
    if arguments.record:
        record(section(results, settings, datetime.date.today()), RESULTS)
    write_report(arguments, "speed", asdict(results))
    return 0
