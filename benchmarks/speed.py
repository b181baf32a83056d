"""Denoising here against diffusers: ratios of times from interleaved runs, within a minute.

    python3 run.py bench speed [--quick] [--seconds 50] [--threads 1] [--json FILE]

Both sides run eagerly, on the CPU in float32, models of the same small sizes with random weights, Euler, no
CFG. A run is everything that depends on the prompt or the step: here once `prepare` and then the steps; in
diffusers, which computes text projection, rotary tables and modulations at each step, the steps. The two
take turns, so that whatever else the machine does slows both. Nothing is asserted: a ratio above 1 means
that flux_core is faster.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from ..flux_core.pipeline import guided_velocity
from ..flux_core.schedule import make_sigmas
from ..flux_core.spec import Conditioning, FluxSpec
from ..flux_core.transformer import FluxTransformer, pack, position_ids, unpack
from .reference.models import diffusers_of_size
from .report import add_json, write_report

NEEDS = "test"  # the part of run.py's environment that has diffusers
SPEC = FluxSpec(256, 4, 2, 4, context_in=128, vec_in=64, guidance_embed=True)
QUICK_SPEC = FluxSpec(64, 2, 1, 1, context_in=32, vec_in=16, guidance_embed=True)
SIZES = ((8, 8), (16, 16), (32, 32))
TEXT_LENGTH = 64


def runs(spec: FluxSpec, h: int, w: int, steps: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """One picture's denoising by us and by diffusers."""
    ours, theirs = FluxTransformer(spec).eval(), diffusers_of_size(spec)
    txt, pooled = torch.randn(1, TEXT_LENGTH, spec.context_in), torch.randn(1, spec.vec_in)
    noise = torch.randn(1, 16, h, w)
    sigmas = make_sigmas(steps, h * w // 4).tolist()
    ids, guidance = position_ids(TEXT_LENGTH, h, w), torch.tensor([3.5])

    def run_ours() -> torch.Tensor:
        velocity = guided_velocity(ours, Conditioning(txt, pooled, 3.5), None, 1.0, sigmas[:-1], h, w, 1)
        x = noise
        for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
            x = x + (after - sigma) * velocity(x, sigma)
        return x

    def run_theirs() -> torch.Tensor:
        x = pack(noise)
        for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
            v = theirs(
                hidden_states=x,
                timestep=torch.tensor([sigma]),
                guidance=guidance,
                pooled_projections=pooled,
                encoder_hidden_states=txt,
                txt_ids=ids[:TEXT_LENGTH],
                img_ids=ids[TEXT_LENGTH:],
            ).sample
            x = x + (after - sigma) * v
        return unpack(x, h, w)

    return run_ours, run_theirs


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(spec: FluxSpec, h: int, w: int, steps: int, budget: float) -> dict[str, float]:
    """Median ratio and its quartiles, from as many turns as the budget (seconds) allows; time a step."""
    ours, theirs = runs(spec, h, w, steps)
    seconds(ours), seconds(theirs)  # the first run of each pays for allocations
    end = time.perf_counter() + budget
    pairs: list[tuple[float, float]] = []
    while len(pairs) < 3 or time.perf_counter() < end:
        pairs.append((seconds(ours), seconds(theirs)))
    low, middle, high = statistics.quantiles([their / our for our, their in pairs], n=4)
    per_step = 1000 * statistics.median(our for our, _ in pairs) / steps
    return {
        "width": 8 * w,
        "height": 8 * h,
        "steps": steps,
        "milliseconds_per_step": per_step,
        "ratio": middle,
        "ratio_low": low,
        "ratio_high": high,
        "turns": len(pairs),
    }


def line(row: dict[str, float]) -> str:
    return (
        f"{row['width']:4d} x {row['height']:<4d} {row['steps']:3d} steps  "
        f"{row['milliseconds_per_step']:8.2f} ms/step  diffusers takes {row['ratio']:.2f} times as long "
        f"({row['ratio_low']:.2f} to {row['ratio_high']:.2f}, {row['turns']} turns)"
    )


def main(argv: list[str]) -> int:
    """Compare at every size, print a line for each; 0."""
    parser = argparse.ArgumentParser(prog="run.py bench speed", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="tiny model and few steps: does it run at all?")
    parser.add_argument("--seconds", type=float, default=50.0, help="time to spend (default 50)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    add_json(parser)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    spec, steps, budget = (
        (QUICK_SPEC, 2, 0.0) if arguments.quick else (SPEC, 8, arguments.seconds / len(SIZES))
    )
    print(f"torch {torch.__version__}, {arguments.threads} threads, {spec}")
    rows: list[dict[str, float]] = []
    with torch.no_grad():
        for h, w in SIZES:
            rows.append(compare(spec, h, w, steps, budget))
            print(line(rows[-1]), flush=True)
    write_report(arguments, "speed", {"sizes": rows})
    return 0
