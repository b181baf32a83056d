"""Ours against diffusers, and ComfyUI where COMFYUI_PATH names it: ratios, within ten minutes.

    python3 run.py bench speed [--quick] [--cases miniature,full,int8,vae,pictures] [--seconds 120]
                               [--threads N] [--clock wall|cpu] [--device cpu|cuda] [--models DIR]
                               [--json FILE] [--record]

Both sides run eagerly on the same weights, inputs and dtype, and take turns (ours, theirs, theirs, ours), so
that whatever else the machine does slows both. Each comparison ends in a line

  ratio CASE N     theirs over ours in time, a median over turns: above 1, ours is faster

  miniature        8 steps at 128 px in fp32 with what depends on the prompt; theirs does that at each step
  full-DTYPE-SIDE  a step of 1 double and 2 single blocks of FLUX.1's width, 512 text tokens, random weights;
                   int8 against diffusers in bf16. What we do once a run is not in it, theirs does it again
  int8             no times: what a layer loses in int8, on random and on outlier-heavy weights
  vae-..., text-encode, whole-picture, load, first-picture     decode and encode in full width, the rest of
                   the shipped miniature

--clock cpu counts the seconds that this process computes: for one thread on a machine that others use. The
GPU (--device cuda) is written for and was never measured. What is skipped is printed with the reason, and so
are cases for which no time is left. --record appends the ratios to benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import time
from dataclasses import asdict
from pathlib import Path

import torch

from . import speed_blocks, speed_models
from .report import add_json, machine, parser_of, positive, write_report
from .speed_settings import Case, Settings, Skipped, Told
from .turns import CLOCKS, Clock, Ratio

NEEDS = "test"  # the part of run.py's environment that has diffusers
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
LIMIT = 420.0  # seconds after which no comparison begins
COMPARISONS = 12  # about, that share the seconds of --seconds

CASES: dict[str, Case] = {
    "miniature": speed_blocks.miniature,
    "full": speed_blocks.full_width,
    "int8": speed_blocks.int8_error,
    "vae": speed_models.autoencoder,
    "pictures": speed_models.pictures,
}


def measured(names: list[str], settings: Settings) -> tuple[list[Ratio], list[Skipped], list[str]]:
    """Ratios, what was skipped and what was told, each printed as it comes."""
    ratios: list[Ratio] = []
    skipped: list[Skipped] = []
    told: list[str] = []
    for name in names:
        case = CASES[name](settings) if not settings.is_over else iter([Skipped(name, "the time is over")])
        for outcome in case:
            if isinstance(outcome, Ratio):
                ratios.append(outcome)
                print(outcome.lines(), flush=True)
            elif isinstance(outcome, Told):
                told.append(outcome.line)
                print(outcome.line, flush=True)
            else:
                skipped.append(outcome)
                print(f"skipped {outcome.case}: {outcome.why}", flush=True)
    return ratios, skipped, told


def entry(
    ratios: list[Ratio], skipped: list[Skipped], told: list[str], settings: Settings, today: datetime.date
) -> str:
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
        "| case | ratio | least to greatest | turns | ours, ms | theirs, ms | |",
        "|-|-|-|-|-|-|-|",
    ]
    lines += [
        f"| {r.case} | {r.ratio:.2f} | {r.low:.2f} to {r.high:.2f} | {r.turns} | {1000 * r.ours:.1f} "
        f"| {1000 * r.theirs:.1f} | {r.note} |"
        for r in ratios
    ]
    if told:
        lines += ["", *(f"- {line}" for line in told)]
    if skipped:
        lines += ["", *(f"- skipped {one.case}: {one.why}" for one in skipped)]
    return "\n".join(lines) + "\n"


def record(section: str, file: Path) -> None:
    """Append a section to the file of results."""
    head = "# Results of `bench speed`\n\nAppended by the script (`--record`): theirs over ours in time.\n"
    before = file.read_text(encoding="utf-8") if file.exists() else head
    file.write_text(f"{before.rstrip()}\n\n{section}", encoding="utf-8")


def cases_of(text: str) -> list[str]:
    """The names in a list with commas, for argparse."""
    names = text.split(",")
    for name in names:
        if name not in CASES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(CASES)}")
    return names


def main(argv: list[str]) -> int:
    """Run the cases, print their ratios; 0."""
    parser = parser_of("speed", __doc__)
    parser.add_argument("--quick", action="store_true", help="small models, two turns: does it run at all?")
    parser.add_argument("--cases", type=cases_of, default=list(CASES), help=f"of {', '.join(CASES)}; all")
    parser.add_argument("--seconds", type=float, default=120.0, help="for the turns of all cases (120)")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="what seconds are (wall)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (cpu)")
    parser.add_argument("--models", type=Path, default=ROOT / "models", help="folder of the miniatures")
    parser.add_argument("--record", action="store_true", help="append the ratios to benchmarks/RESULTS.md")
    add_json(parser)
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, got none; leave it out to measure on the CPU")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    clock = Clock(arguments.clock, torch.device(arguments.device))
    budget = 0.0 if arguments.quick else arguments.seconds / COMPARISONS
    settings = Settings(arguments.quick, budget, clock, arguments.models, time.perf_counter() + LIMIT)
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), {arguments.clock} clock", flush=True)
    with torch.no_grad():
        ratios, skipped, told = measured(arguments.cases, settings)
    if arguments.record:
        record(entry(ratios, skipped, told, settings, datetime.date.today()), RESULTS)
    figures = {
        "ratios": [asdict(ratio) for ratio in ratios],
        "skipped": [asdict(one) for one in skipped],
        "told": told,
    }
    write_report(arguments, "speed", figures)
    return 0
