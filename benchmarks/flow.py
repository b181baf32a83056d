"""Diffusion, flow matching and rectified flow on points of the plane: distances, straightness.

    python3 run.py bench flow [--quick] [--json FILE] [--figure FILE] [--seed N] [--threads N]

On each of three distributions five flows are trained: a diffusion (noise prediction on DDPM's chain), flow
matching on independent pairs, which is the 1-rectified flow, flow matching on minibatch optimal-transport
pairs, and the 2- and 3-rectified flow. The table lists for each

  energy distance   of Euler's samples to new data at 1 to 32 steps (of the diffusion: of its
                    probability-flow ODE), and the floor, the distance between two samples of the data
  S                 straightness of its own ODE (flux_core/flow/straightness.py), 0 is straight
  cost              E|noise - x0|^2 of the pairs that it was trained on, and of the pairs that it generates

Samples start from new noise, never from that of training pairs. Then the diffusion's network is sampled in
four ways, and the order of every deterministic solver is measured on a velocity in closed form. The last line
has three results: S of the 1- over S of the 2-rectified flow on the ring, the mean energy distance of the
2-rectified flow's samples in one Euler step over the floor, and the largest difference between a measured
order and its theory. A figure shows samples and paths of each method.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Generator, Tensor

from ..flux_core.flow import energy_distance, energy_floor, straightness, transport_cost
from ..flux_core.model.spec import Velocity
from ..flux_core.sampling.solver import SOLVERS, integrate
from ..flux_core.train.progress import ProgressLine
from .flow_figure import Block, Panel, draw_sheet
from .flow_methods import TITLES, Laboratory, Method, Plan
from .flow_plane import DATA, Draw, Recipe, noise
from .flow_theory import bridge, orders
from .report import add_json, writable, write_report

ROOT = Path(__file__).resolve().parents[1]
STEPS = (1, 2, 4, 8, 32)
SHOWN_STEPS = (1, 4, 32)
DIGITS = {"straightness_ratio": 1, "one_step_over_floor": 3, "worst_order_error": 4}
SLATE = (70, 78, 96)
COLORS = {
    "diffusion": (118, 84, 173),
    "flow_matching": (38, 98, 176),
    "transport": (20, 132, 110),
    "rectified_2": (213, 94, 24),
    "rectified_3": (190, 45, 79),
}


@dataclass(frozen=True)
class Sizes:
    """The size of trainings and measurements."""

    plan: Plan
    points: int = 10_000  # on each side of an energy distance
    draws: int = 24  # of `points` each, for the last line; the tables use one
    straight_points: int = 4096
    straight_steps: int = 100
    bridge_points: int = 2000


FULL = Sizes(
    Plan(
        {
            "diffusion": Recipe(2500),
            "flow_matching": Recipe(3000),
            "transport": Recipe(2500),
            "rectified_2": Recipe(4000, rate=1e-2),
            "rectified_3": Recipe(2000),
        }
    )
)


def main(argv: list[str], sizes: Sizes = FULL) -> int:
    """Train, measure, print the tables, draw the figure; the exit code, 0."""
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    names = ["ring"] if arguments.quick else list(DATA)
    progress = Progress(len(names) * sum(recipe.steps for recipe in sizes.plan.recipes.values()))
    data: dict[str, Any] = {}
    evaluations: dict[str, Evaluation] = {}
    for name in names:
        progress.data = name
        laboratory = Laboratory(DATA[name], sizes.plan, arguments.seed, progress)
        methods = dict(laboratory.run())
        evaluation = evaluations[name] = Evaluation(DATA[name], sizes)
        data[name] = evaluation.table(methods)
        print_table(name, data[name])
        if name == "ring":
            bridged = evaluation.bridge(laboratory)
            print_bridge(bridged)
            headline = evaluation.headline(data[name], methods["rectified_2"].velocity)
    measured = {name: {"measured": value, "theory": theory} for name, (value, theory) in orders().items()}
    print_orders(measured)
    headline["worst_order_error"] = max(abs(row["measured"] - row["theory"]) for row in measured.values())
    draw_figure(arguments.figure, evaluations, data)
    figures = {
        "data": data,
        "bridge": bridged,
        "orders": measured,
        "headline": headline,
        "sizes": asdict(sizes),
    }
    write_report(arguments, "flow", figures)
    print(" ".join(f"{name} {value:.{DIGITS[name]}f}" for name, value in headline.items()))
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run.py bench flow", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="only the ring")
    parser.add_argument(
        "--figure", type=writable, default=ROOT / "data" / "flow.png", help="the PNG (default data/flow.png)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and training data (default 0)")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="threads of torch (default 1: more gain little on such small networks)",
    )
    add_json(parser)
    return parser.parse_args(argv)


class Progress:
    """The progress line on standard error; called once per training step with the title of the method."""

    def __init__(self, steps: int) -> None:
        self.line, self.step, self.data = ProgressLine(steps), 0, ""

    def __call__(self, title: str) -> None:
        self.step += 1
        self.line.update(self.step, f"{self.data}: {title}")


class Evaluation:
    """Measures flows on one distribution, with the same new points for each method."""

    def __init__(self, draw: Draw, sizes: Sizes) -> None:
        self.draw, self.sizes = draw, sizes
        self.generator = Generator().manual_seed(1_000_003)
        self.data = draw(sizes.points, self.generator)
        self.noise = noise(sizes.points, self.generator)
        self.samples: dict[str, dict[int, Tensor]] = {}
        self.paths: dict[str, Tensor] = {}

    def table(self, methods: dict[str, Method]) -> dict[str, Any]:
        """The floor, and the row of each method."""
        rows = {key: self.measure(key, method) for key, method in methods.items()}
        return {"floor": energy_floor(self.data, self.sizes.points), "methods": rows}

    def measure(self, key: str, method: Method) -> dict[str, Any]:
        """The row of one method; its samples and a few paths are kept for the figure."""
        ends = {steps: sample(method.velocity, self.noise, steps) for steps in STEPS}
        some = self.noise[: self.sizes.straight_points]
        self.samples[key], self.paths[key] = ends, trace(method.velocity, self.noise[:70], STEPS[-1])
        return {
            "energy_distance": {steps: energy_distance(end, self.data) for steps, end in ends.items()},
            "straightness": straightness(method.velocity, some, self.sizes.straight_steps),
            "pairs_cost": method.pairs_cost,
            "own_cost": transport_cost(ends[STEPS[-1]], self.noise),
            "seconds": method.seconds,
        }

    def bridge(self, laboratory: Laboratory) -> dict[str, Any]:
        """Energy distance of four samplers of the diffusion's network, from the same noise.

        A mean over four parts: that of one part varies by half.
        """
        part = self.sizes.bridge_points
        data, start = (draw(4 * part, self.generator) for draw in (self.draw, noise))
        distances: dict[str, float] = {}
        for title, run in bridge(laboratory.chain, laboratory.noise_network, self.generator).items():
            pairs = zip(run(start).split(part), data.split(part), strict=True)
            distances[title] = sum(energy_distance(x, y) for x, y in pairs) / 4
        return {"floor": energy_floor(data[:part], part), "samplers": distances}

    def headline(self, table: dict[str, Any], velocity: Velocity) -> dict[str, float]:
        """Straightness ratio and one-step energy distance of the 2-rectified flow, a mean over draws."""
        total = 0.0
        for _ in range(self.sizes.draws):
            fresh = self.draw(self.sizes.points, self.generator)
            start = noise(self.sizes.points, self.generator)
            total += energy_distance(sample(velocity, start, 1), fresh)
        rows = table["methods"]
        return {
            "straightness_ratio": rows["flow_matching"]["straightness"] / rows["rectified_2"]["straightness"],
            "one_step_over_floor": total / self.sizes.draws / table["floor"],
        }


def sample(velocity: Velocity, start: Tensor, steps: int) -> Tensor:
    """Points after `steps` equal Euler steps."""
    return integrate(SOLVERS["euler"], velocity, start, torch.linspace(1, 0, steps + 1, dtype=torch.float64))


def trace(velocity: Velocity, start: Tensor, steps: int) -> Tensor:
    """The points at each step, [steps + 1, B, 2]."""
    passed: list[Tensor] = []
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    end = integrate(SOLVERS["euler"], velocity, start, sigmas, lambda step: passed.append(step.x))
    return torch.stack([*passed, end])


def print_table(name: str, table: dict[str, Any]) -> None:
    print(
        f"\n{name}: energy distance x 1000 after so many Euler steps (one draw: it varies by half around "
        f"its mean), floor {1000 * table['floor']:.2f}"
    )
    steps = "".join(f"{count:10d}" for count in STEPS)
    print(f"{'':28}{steps}{'S':>10}{'cost: pairs':>14}{'own':>8}{'seconds':>9}")
    for key, row in table["methods"].items():
        distances = "".join(f"{1000 * value:10.2f}" for value in row["energy_distance"].values())
        print(
            f"{TITLES[key]:28}{distances}{row['straightness']:10.4f}{row['pairs_cost']:14.2f}"
            f"{row['own_cost']:8.2f}{row['seconds']:9.1f}",
            flush=True,
        )


def print_bridge(table: dict[str, Any]) -> None:
    print(f"\none diffusion network on the ring: energy distance x 1000; floor {1000 * table['floor']:.2f}")
    for title, value in table["samplers"].items():
        print(f"{title:44}{1000 * value:10.2f}", flush=True)


def print_orders(table: dict[str, Any]) -> None:
    print("\nsolver orders, measured in float64 on the velocity of a Gaussian mixture")
    for name, row in table.items():
        print(f"{name:28}{row['measured']:9.3f}   theory {row['theory']}")


def draw_figure(path: Path, evaluations: dict[str, Evaluation], data: dict[str, Any]) -> None:
    """A block for each distribution: data and noise, then samples and some paths of each method."""
    blocks: list[Block] = []
    for name, evaluation in evaluations.items():
        rows = [figure_row(evaluation, key, row) for key, row in data[name]["methods"].items()]
        head = [
            ("data", Panel(SLATE, points=evaluation.data)),
            ("noise", Panel(SLATE, points=evaluation.noise)),
        ]
        columns = [*(f"{count} step{'s' * (count > 1)}" for count in SHOWN_STEPS), "paths"]
        blocks.append(Block(name, head, columns, rows))
    legend = "gray: data\ncolor: samples\nvalue: energy\ndistance x 1000\nS: straightness"
    titles = [title.replace(" (", "\n(").replace(" = ", "\n= ") for title in TITLES.values()]
    path.parent.mkdir(exist_ok=True)  # data/ is ignored by git
    draw_sheet(blocks, legend, titles).quantize(256, dither=Image.Dither.NONE).save(
        path, "PNG", optimize=True
    )
    print(f"\nfigure: {path}")


def figure_row(evaluation: Evaluation, key: str, row: dict[str, Any]) -> list[Panel]:
    """The panels of one method on one distribution."""
    panels = [
        Panel(
            COLORS[key],
            evaluation.data,
            evaluation.samples[key][count],
            note=f"{1000 * row['energy_distance'][count]:.2f}",
        )
        for count in SHOWN_STEPS
    ]
    note = f"S {row['straightness']:.3g}"
    return [*panels, Panel(COLORS[key], evaluation.data, paths=evaluation.paths[key], note=note)]
