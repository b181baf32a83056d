"""Ours against diffusers, and ComfyUI where COMFYUI_PATH names it: ratios, within ten minutes.

    python3 run.py bench speed [--quick] [--cases miniature,full,int8,vae,pictures,png,memory,fp8]
                               [--seconds 120] [--threads N] [--clock wall|cpu] [--device cpu|cuda]
                               [--models DIR] [--large] [--json FILE] [--record]

Both sides run eagerly on the same weights, inputs and dtype, and take turns (ours, theirs, theirs, ours), so
that whatever else the machine does slows both. Each comparison ends in a line

  ratio CASE N     theirs over ours in time, a median over turns: above 1, ours is faster (memory: is less)

  miniature        8 steps at 128 px in fp32 with what depends on the prompt; theirs does that at each step
  full-DTYPE-SIDE  a step of 1 double and 2 single blocks of FLUX.1's width, 512 text tokens, random weights;
                   int8 against diffusers in bf16 (both only in fp32 where a processor would take minutes for
                   bf16). What we do once a run is not in it, theirs does it again
  int8             no times: what a layer loses in int8, on random and on outlier-heavy weights
  vae-..., text-encode, whole-picture, load, first-picture     decode and encode in full width, the rest of
                   the shipped miniature; vae-...-fp32 is ours in bf16 against diffusers in fp32
  png-SIDE         [schnell] in 4 steps, from the prompt's words to the bytes of a PNG: the miniature, with
                   --device cuda full size with random weights, T5-XXL and CLIP-L
  memory-...       the most bytes above the weights of a step and a decode at 512 px and of a picture by the
                   miniature, each side in a process of its own. --large adds our decode at 2048 px: minutes
  fp8              no times: what mini-dev's velocity loses when one kind of layer multiplies in fp8
  gpu              with --device cuda, and first there: FLUX.1 [dev] (28 steps) and [schnell] (4) in full
                   size with random weights at 512 and 1024 px, batch 1 and 4, bf16 and fp8, against
                   diffusers eager and compiled, and the rate of it beside that of a matrix product. Of long
                   loops a few steps are measured ("28 steps from 3"). Never run on a GPU yet

--clock cpu counts the seconds that this process computes: for one thread on a machine that others use. What
is skipped is printed with the reason, and so are cases for which no time is left. --record appends the
ratios to benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import time
from dataclasses import asdict
from pathlib import Path

import torch

from . import speed_blocks, speed_fp8, speed_gpu, speed_memory, speed_models, speed_png
from .interleaved import Ratio
from .report import add_json, machine, parser_of, write_report
from .speed_settings import Case, Settings, Skipped, Told, add_options, clock_of

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
    "png": speed_png.png,
    "memory": speed_memory.memory,
    "fp8": speed_fp8.fp8_error,
    "gpu": speed_gpu.full_size,
}
BY_DEFAULT = {
    "cpu": [name for name in CASES if name != "gpu"],
    "cuda": ["gpu", "png", "vae", "memory", "miniature", "full", "pictures"],
}
"""Cases of a device, what matters most first where the time is short."""


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
        "| case | ratio | least to greatest | turns | ours | theirs | |",
        "|-|-|-|-|-|-|-|",
    ]
    lines += [
        f"| {r.case} | {r.ratio:.2f} | {r.low:.2f} to {r.high:.2f} | {r.turns} | {r.told(r.ours)} "
        f"| {r.told(r.theirs)} | {r.note} |"
        for r in ratios
    ]
    if told:
        lines += ["", *(f"- {line}" for line in told)]
    if skipped:
        lines += ["", *(f"- skipped {one.case}: {one.why}" for one in skipped)]
    return "\n".join(lines) + "\n"


def record(section: str, file: Path) -> None:
    """Append a section to the file of results."""
    about = "Appended by the script (`--record`): theirs over ours, in time or memory."
    head = f"# Results of `bench speed`\n\n{about}\n"
    before = file.read_text(encoding="utf-8") if file.exists() else head
    file.write_text(f"{before.rstrip()}\n\n{section}", encoding="utf-8")


def main(argv: list[str]) -> int:
    """Run the cases, print their ratios; 0."""
    parser = parser_of("speed", __doc__)
    add_options(parser, CASES)
    parser.add_argument("--seconds", type=float, default=120.0, help="for the turns of all cases (120)")
    parser.add_argument("--large", action="store_true", help="the memory of a decode at 2048 px, too")
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)  # what of `memory`, and whose
    parser.add_argument("--record", action="store_true", help="append the ratios to benchmarks/RESULTS.md")
    add_json(parser)
    arguments = parser.parse_args(argv)
    clock = clock_of(parser, arguments)
    budget = 0.0 if arguments.quick else arguments.seconds / COMPARISONS
    end = time.perf_counter() + LIMIT
    settings = Settings(arguments.quick, budget, clock, arguments.models, end, arguments.large)
    if arguments.alone:
        taken = speed_memory.above_weights(*arguments.alone, settings)
        write_report(arguments, "speed", {"bytes": taken})
        return 0
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), {arguments.clock} clock", flush=True)
    with torch.no_grad():
        ratios, skipped, told = measured(arguments.cases or BY_DEFAULT[arguments.device], settings)
    if arguments.record:
        record(entry(ratios, skipped, told, settings, datetime.date.today()), RESULTS)
    figures = {
        "ratios": [asdict(ratio) for ratio in ratios],
        "skipped": [asdict(one) for one in skipped],
        "told": told,
    }
    write_report(arguments, "speed", figures)
    return 0
