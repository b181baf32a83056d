"""What the theory buys: adherence and sharpness of pro, pro reflowed, dev and schnell over the steps.

    python3 run.py bench family [--seeds 1] [--steps 1 2 4 8 28] [--figure FILE] [--json FILE] [--quick]
                                [--variants pro stochastic reflow dev schnell] [--models DIR] [--threads N]

The prompts of `bench adherence` without "words" are painted in every way of sampling (WAYS of members.py: its
guidance, its schedule) in every number of steps, always from the same noise: by Euler's steps along the flow,
and by pro "stochastic" as well, that is with noise added on the way (solver euler_ancestral).
A Markdown table has a row for each way: adherence / sharpness after so many steps. Adherence is the share of
pictures that the strict checker finds right, a mean over GenEval's six categories; sharpness is that of
miniature/checker.py, 1.0 is as sharp as a render. A second table has the adherence of the combinations
that training never shows. Further columns:

  network passes  a step: true classifier-free guidance takes two
  S               straightness over 24 equal steps, unshifted for all, of the velocity with its guidance, for
                  64 of the prompts: the sum over the latent's elements (flux_core/flow/straightness.py)
                  divided by their number; 0 is straight. schnell, trained for four steps, is no flow;
                  the flow of "pro, stochastic" is pro's
  seconds         from one prompt to the bytes of one PNG, models loaded, batch 1, at its own number of steps:
                  medians of runs that took turns

--figure draws both over the steps. The last line has the figures that it is all about; the ratio is S of pro
over S of pro reflowed. What a --variants or --steps leaves out is missing there.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..flux_core.train.progress import ProgressLine
from .family_variants import SIDE, STRAIGHT_STEPS, Member, load_members, seconds_of, straightness_of
from .generate import figures_of, judge_pictures
from .line_chart import Chart, Line, draw_charts, reaching
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
HUES = {
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
PICTURE = 3  # decoding and judging a picture takes about as long as so many network passes


def main(argv: list[str], members: dict[str, Member] | None = None) -> int:
    """Measure the family (or these `members` of it), print the tables, draw the figure; the exit code."""
    args = _parser().parse_args(argv)
    args.steps = sorted(set(args.steps))
    args.variants = [variant for variant in TITLES if variant in args.variants]
    torch.set_num_threads(args.threads)
    try:
        found = run(args, members or load_members(args.models, args.variants))
    except (OSError, ValueError) as error:
        print(f"bench family: {error}", file=sys.stderr)
        return 1
    print(last_line(found))
    return 0


def run(args: argparse.Namespace, members: dict[str, Member]) -> dict[str, Any]:
    """Everything but the last line; the figures of each way. Raises what models and files raise."""
    prompts = [prompt for prompt in categories() if prompt.category != "words"]
    prompts, seeds, rounds = (prompts[::8], 1, 3) if args.quick else (prompts, args.seeds, ROUNDS)
    chosen = evenly(prompts, STRAIGHT_PROMPTS // 8 if args.quick else STRAIGHT_PROMPTS)
    runs = runs_of(members)
    progress = Progress(work(members, args.steps, len(prompts) * seeds, len(chosen), runs, rounds))
    found: dict[str, Any] = {}
    for variant, member in members.items():
        found[variant] = {"sampling": asdict(member.sampling), "passes_a_step": member.passes}
        found[variant]["steps"] = {}
        for steps in args.steps:
            progress.note = f"{variant}, steps: {steps}"
            found[variant]["steps"][steps] = score(member, prompts, seeds, steps, progress)
        progress.note = f"{variant}, straightness"
        found[variant]["straightness"] = straightness_of(member, chosen, progress)
    progress.note = "seconds a picture"
    for (variant, steps), seconds in seconds_of(members, runs, chosen, rounds, progress).items():
        found[variant].setdefault("seconds", {})[steps] = seconds
    pictures = "one picture" if seeds == 1 else f"{seeds} pictures"
    told = f"{len(prompts)} prompts, {pictures} of each, {SIDE} x {SIDE} pixels"
    print(
        f"Adherence / sharpness after so many steps ({told}):",
        table(found),
        "Adherence of combinations that training never shows:",
        unseen_table(found),
        sep="\n\n",
        end="\n\n",
    )
    if args.figure is not None:
        draw_figure(args.figure, found, told)
    write_report(args, "family", {"straight_prompts": len(chosen), "rounds": rounds, "variants": found})
    return found


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("family", __doc__)
    parser.add_argument("--seeds", type=positive, default=1, help="pictures of each prompt (default 1)")
    parser.add_argument(
        "--steps", type=positive, nargs="+", default=STEPS, help="numbers of steps (default 1 2 4 8 28)"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=tuple(TITLES), default=tuple(TITLES), help="members (default all)"
    )
    parser.add_argument("--quick", action="store_true", help="an eighth of the prompts, one picture of each")
    parser.add_argument("--figure", type=writable, metavar="FILE", help="draw the lines to this PNG")
    parser.add_argument(
        "--models", type=Path, default=ROOT / "models", metavar="DIR", help="folder of models"
    )
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="threads of torch")
    add_json(parser)
    return parser


class Progress:
    """The line on standard error; called with the network passes done, for `note`."""

    def __init__(self, passes: int) -> None:
        self.line, self.done, self.note = ProgressLine(passes), 0, ""

    def __call__(self, passes: int) -> None:
        self.done += passes
        self.line.update(self.done, self.note)


def work(
    members: dict[str, Member],
    steps: Sequence[int],
    pictures: int,
    straight: int,
    runs: Sequence[tuple[str, int]],
    rounds: int,
) -> int:
    """All that Progress will be told of."""
    timed = (rounds + 1) * sum(count * members[variant].passes for variant, count in runs)
    painted = sum(pictures * cost(member, count) for member in members.values() for count in steps)
    followed = sum(straight * STRAIGHT_STEPS * member.passes for member in members.values())
    return timed + painted + followed


def cost(member: Member, steps: int) -> int:
    """Network passes that a judged picture takes as long as."""
    return steps * member.passes + PICTURE


def runs_of(members: dict[str, Member]) -> list[tuple[str, int]]:
    """What is timed: each member at its own number of steps, schnell in one step too."""
    own = [(variant, member.sampling.steps) for variant, member in members.items()]
    return [*own, *([("schnell", 1)] if "schnell" in members else [])]


def evenly(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """So many of them, from all categories alike."""
    return [prompts[i * len(prompts) // count] for i in range(count)]


def score(
    member: Member, prompts: Sequence[Prompt], seeds: int, steps: int, progress: Progress
) -> dict[str, Any]:
    """Overall, categories and sharpness, as `bench adherence` has them."""
    done = progress.done
    pictures = member.paint(
        [prompt for prompt in prompts for _ in range(seeds)],
        steps,
        lambda count: progress(done + count * cost(member, steps) - progress.done),
    )
    figures = figures_of(judge_pictures(prompts, pictures, seeds))
    return {name: figures[name] for name in ("overall", "categories", "sharpness")}


def table(found: dict[str, Any]) -> str:
    """Markdown: a row for each way of sampling."""
    steps = next(iter(found.values()))["steps"]
    rows = [
        [
            TITLES[variant],
            str(row["passes_a_step"]),
            *(f"{one['overall']:.2f} / {number(one['sharpness'])}" for one in row["steps"].values()),
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
        "seconds a picture in so many steps",
    ]
    return markdown(head, rows)


def unseen_table(found: dict[str, Any]) -> str:
    """Markdown: the same rows and steps, unseen combinations alone."""
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


def number(value: float) -> str:
    """With two digits; "-" where nothing could be measured."""
    return f"{value:.2f}" if math.isfinite(value) else "-"


def last_line(found: dict[str, Any]) -> str:
    """The figures that it is all about, as far as they were measured."""
    parts = ["family"]
    for variant, steps in HEADLINE:
        if variant in found and steps in found[variant]["steps"]:
            parts.append(f"{variant}@{steps} {found[variant]['steps'][steps]['overall']:.2f}")
    if {"pro", "reflow"} <= found.keys():
        ratio = found["pro"]["straightness"] / found["reflow"]["straightness"]
        parts.append(f"straightness_ratio {ratio:.1f}")
    return " ".join(parts)


def draw_figure(path: Path, found: dict[str, Any], told: str) -> None:
    """Adherence and sharpness over the steps, side by side."""
    lines: dict[str, list[Line]] = {
        key: [
            Line(TITLES[variant], HUES[variant], {n: one[key] for n, one in row["steps"].items()})
            for variant, row in found.items()
        ]
        for key in ("overall", "sharpness")
    }
    top = reaching(lines["sharpness"], 1.2, 0.2)
    charts = [
        Chart("Adherence (GenEval's six categories)", lines["overall"], 0.0, 1.0, 0.2),
        Chart("Sharpness of edges", lines["sharpness"], 0.0, top, 0.2, (1.0, "as sharp as a render")),
    ]
    twice = [TITLES[variant] for variant, row in found.items() if row["passes_a_step"] == 2]
    passes = f". {' and '.join(twice)}: two network passes a step, else one" if twice else ""
    draw_charts(charts, f"{told}, always from the same noise{passes}").save(path, "PNG", optimize=True)
    print(f"figure: {path}\n")
