"""What the theory gains: adherence and sharpness of each variant by number of steps.

    python3 run.py bench family [--seeds 1] [--steps 1 2 4 8 28] [--figure FILE] [--json FILE] [--quick]
                                [--variants pro stochastic reflow dev schnell] [--models DIR] [--threads N]

Each variant (VARIANTS of family_variants.py: its guidance, its schedule) generates the prompts of `bench
adherence`, except "words", in every number of steps, always from the same noise: by Euler steps along the
flow, and pro also "stochastic", with noise added on the way (solver euler_ancestral). A Markdown table has
a row for each variant: adherence / sharpness after so many steps. Adherence is the share of images that the
strict checker accepts, a mean over GenEval's six categories; sharpness is that of miniature/checker.py, 1.0
is as sharp as a render. A second table has the adherence of the combinations that training never shows.
Further columns:

  network passes  per step: classifier-free guidance takes two
  S               straightness over 24 equal steps, unshifted for all, of the guided velocity, for 64 of the
                  prompts: the sum over the latent's elements (flux_core/flow/straightness.py) divided by
                  their count; 0 is straight. schnell, trained for four steps, is not a flow; the flow of
                  "pro, stochastic" is pro's
  seconds         from one prompt to the bytes of one PNG, models loaded, batch 1, at its own number of steps:
                  medians of interleaved runs

--figure draws both over the steps. The last line has the adherence of pro and dev in 28 steps, of schnell in
4 and 1, and the ratio of S of pro to S of pro reflowed, as far as they were measured.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..flux_core.train.progress import ProgressLine
from .family_variants import SIDE, STRAIGHT_STEPS, Variant, load_variants, seconds_of, straightness_of
from .generate import check_images, scores
from .line_chart import Chart, Line, axis_top, draw_charts
from .prompts import Prompt, categories
from .report import add_json, parser_of, positive, writable, write_report

ROOT = Path(__file__).resolve().parents[1]
TITLES = {
    "pro": "pro",
    "stochastic": "pro, stochastic",
    "reflow": "pro reflowed",
    "dev": "dev",
    "schnell": "schnell",
}
COLORS = {
    "pro": (38, 98, 176),
    "stochastic": (196, 60, 110),
    "reflow": (213, 94, 24),
    "dev": (20, 132, 110),
    "schnell": (118, 84, 173),
}
STEPS = (1, 2, 4, 8, 28)
HEADLINE = (("pro", 28), ("dev", 28), ("schnell", 4), ("schnell", 1))
STRAIGHT_PROMPTS = 64
ROUNDS = 7  # of timing; 3 with --quick
CHECK_COST = 3  # decoding and checking an image takes about as long as so many network passes


def main(argv: list[str], variants: dict[str, Variant] | None = None) -> int:
    """Measure the variants (of the options, or those given), print tables, draw the figure; the exit code."""
    args = _parser().parse_args(argv)
    args.steps = sorted(set(args.steps))
    args.variants = [variant for variant in TITLES if variant in args.variants]
    torch.set_num_threads(args.threads)
    try:
        found = run(args, variants or load_variants(args.models, args.variants))
    except (OSError, ValueError) as error:
        print(f"bench family: {error}", file=sys.stderr)
        return 1
    print(last_line(found))
    return 0


def run(args: argparse.Namespace, variants: dict[str, Variant]) -> dict[str, Any]:
    """Everything but the last line; the figures of each variant. Raises what models and files raise."""
    prompts = [prompt for prompt in categories() if prompt.category != "words"]
    prompts, seeds, rounds = (prompts[::8], 1, 3) if args.quick else (prompts, args.seeds, ROUNDS)
    chosen = evenly(prompts, STRAIGHT_PROMPTS // 8 if args.quick else STRAIGHT_PROMPTS)
    runs = runs_of(variants)
    work = Work(args.steps, len(prompts) * seeds, len(chosen), runs, rounds)
    progress = Progress(work.passes(variants))
    found: dict[str, Any] = {}
    for name, variant in variants.items():
        found[name] = {"sampling": asdict(variant.sampling), "passes_per_step": variant.passes}
        found[name]["steps"] = {}
        for steps in args.steps:
            progress.note = f"{name}, steps: {steps}"
            found[name]["steps"][steps] = score(variant, prompts, seeds, steps, progress)
        progress.note = f"{name}, straightness"
        found[name]["straightness"] = straightness_of(variant, chosen, progress)
    progress.note = "seconds an image"
    for (name, steps), seconds in seconds_of(variants, runs, chosen, rounds, progress).items():
        found[name].setdefault("seconds", {})[steps] = seconds
    images = "one image" if seeds == 1 else f"{seeds} images"
    about = f"{len(prompts)} prompts, {images} of each, {SIDE} x {SIDE} pixels"
    print(
        f"Adherence / sharpness after so many steps ({about}):",
        table(found),
        "Adherence of combinations that training never shows:",
        unseen_table(found),
        sep="\n\n",
        end="\n\n",
    )
    if args.figure is not None:
        draw_figure(args.figure, found, about)
    write_report(args, "family", {"straight_prompts": len(chosen), "rounds": rounds, "variants": found})
    return found


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("family", __doc__)
    parser.add_argument("--seeds", type=positive, default=1, help="images of each prompt (default 1)")
    parser.add_argument(
        "--steps", type=positive, nargs="+", default=STEPS, help="numbers of steps (default 1 2 4 8 28)"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=tuple(TITLES), default=tuple(TITLES), help="variants (default all)"
    )
    parser.add_argument("--quick", action="store_true", help="an eighth of the prompts, one image of each")
    parser.add_argument("--figure", type=writable, metavar="FILE", help="draw the lines to this PNG")
    parser.add_argument(
        "--models", type=Path, default=ROOT / "models", metavar="DIR", help="folder of models"
    )
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="threads of torch")
    add_json(parser)
    return parser


class Progress:
    """The progress line on standard error; called with the number of network passes done."""

    def __init__(self, passes: int) -> None:
        self.line, self.done, self.note = ProgressLine(passes), 0, ""

    def __call__(self, passes: int) -> None:
        self.done += passes
        self.line.update(self.done, self.note)


@dataclass(frozen=True)
class Work:
    """Everything that a run of this benchmark computes."""

    steps: Sequence[int]
    images: int
    straight: int
    runs: Sequence[tuple[str, int]]
    rounds: int

    def passes(self, variants: dict[str, Variant]) -> int:
        """Its network passes, checking of images included."""
        timed = (self.rounds + 1) * sum(count * variants[name].passes for name, count in self.runs)
        generated = sum(self.images * cost(one, count) for one in variants.values() for count in self.steps)
        followed = sum(self.straight * STRAIGHT_STEPS * one.passes for one in variants.values())
        return timed + generated + followed


def cost(variant: Variant, steps: int) -> int:
    """The number of network passes that take as long as generating and checking an image."""
    return steps * variant.passes + CHECK_COST


def runs_of(variants: dict[str, Variant]) -> list[tuple[str, int]]:
    """The timed runs: each variant at its own number of steps, schnell also in one step."""
    own = [(name, variant.sampling.steps) for name, variant in variants.items()]
    return [*own, *([("schnell", 1)] if "schnell" in variants else [])]


def evenly(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` of the prompts at equal distances, so that each category is represented."""
    return [prompts[i * len(prompts) // count] for i in range(count)]


def score(
    variant: Variant, prompts: Sequence[Prompt], seeds: int, steps: int, progress: Progress
) -> dict[str, Any]:
    """Overall score, categories and sharpness, as in `bench adherence`."""
    done = progress.done
    images = variant.generate(
        [prompt for prompt in prompts for _ in range(seeds)],
        steps,
        lambda count: progress(done + count * cost(variant, steps) - progress.done),
    )
    figures = scores(check_images(prompts, images, seeds))
    return {name: figures[name] for name in ("overall", "categories", "sharpness")}


def table(found: dict[str, Any]) -> str:
    """Markdown: a row for each variant."""
    steps = next(iter(found.values()))["steps"]
    rows = [
        [
            TITLES[variant],
            str(row["passes_per_step"]),
            *(f"{one['overall']:.2f} / {two_digits(one['sharpness'])}" for one in row["steps"].values()),
            f"{row['straightness']:.3g}",
            ", ".join(f"{seconds:.2f} in {count}" for count, seconds in row["seconds"].items()),
        ]
        for variant, row in found.items()
    ]
    head = [
        "sampling",
        "network passes a step",
        *map(plural, steps),
        "S",
        "seconds an image in so many steps",
    ]
    return markdown(head, rows)


def unseen_table(found: dict[str, Any]) -> str:
    """Markdown: the same rows and steps, only unseen combinations."""
    steps = next(iter(found.values()))["steps"]
    scores = {
        variant: [f"{one['categories']['unseen']['score']:.2f}" for one in row["steps"].values()]
        for variant, row in found.items()
    }
    rows = [[TITLES[variant], *cells] for variant, cells in scores.items()]
    return markdown(["sampling", *map(plural, steps)], rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def plural(steps: int) -> str:
    return "1 step" if steps == 1 else f"{steps} steps"


def two_digits(value: float) -> str:
    """The value with two digits after the point; "-" for NaN."""
    return f"{value:.2f}" if math.isfinite(value) else "-"


def last_line(found: dict[str, Any]) -> str:
    """Adherence by variant and steps, and the ratio of straightness, as far as they were measured."""
    parts = ["family"]
    for variant, steps in HEADLINE:
        if variant in found and steps in found[variant]["steps"]:
            parts.append(f"{variant}@{steps} {found[variant]['steps'][steps]['overall']:.2f}")
    if {"pro", "reflow"} <= found.keys():
        ratio = found["pro"]["straightness"] / found["reflow"]["straightness"]
        parts.append(f"straightness_ratio {ratio:.1f}")
    return " ".join(parts)


def draw_figure(path: Path, found: dict[str, Any], about: str) -> None:
    """Adherence and sharpness over the steps, side by side."""
    lines: dict[str, list[Line]] = {
        key: [
            Line(TITLES[variant], COLORS[variant], {n: one[key] for n, one in row["steps"].items()})
            for variant, row in found.items()
        ]
        for key in ("overall", "sharpness")
    }
    top = axis_top(lines["sharpness"], 1.2, 0.2)
    charts = [
        Chart("Adherence (GenEval's six categories)", lines["overall"], 0.0, 1.0, 0.2),
        Chart("Sharpness of edges", lines["sharpness"], 0.0, top, 0.2, (1.0, "as sharp as a render")),
    ]
    twice = [TITLES[variant] for variant, row in found.items() if row["passes_per_step"] == 2]
    passes = f". {' and '.join(twice)}: two network passes a step, else one" if twice else ""
    draw_charts(charts, f"{about}, always from the same noise{passes}").save(path, "PNG", optimize=True)
    print(f"figure: {path}\n")
