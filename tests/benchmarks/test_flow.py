"""`bench flow` at a tiny size, and its parts against exact results."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from rectiflux.benchmarks import flow
from rectiflux.benchmarks.flow import Evaluation, Sizes, sample
from rectiflux.benchmarks.flow_methods import TITLES, EndTimes, Laboratory, Method, Plan, posterior_mean
from rectiflux.benchmarks.flow_plane import DATA, RING, Recipe, noise
from rectiflux.benchmarks.flow_theory import orders
from rectiflux.flux_core.flow import LinearBetaPath, RectifiedPath, as_velocity
from rectiflux.flux_core.flow import Path as FlowPath
from torch import Generator, Tensor

PLAN = Plan({key: Recipe(3, batch=32) for key in TITLES}, width=8, depth=1, chain=40, matched=32, pairs=64)
TINY = Sizes(PLAN, points=100, draws=2, straight_points=32, straight_steps=4, bridge_points=20)
LAST = r"straightness_ratio \d+\.\d one_step_over_floor \d+\.\d{3} worst_order_error \d\.\d{4}"


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[float, int]]:
    """The solvers' orders, measured and in theory: the one part that no size makes fast."""
    return orders()


@pytest.mark.parametrize("quick", [True, False])
def test_the_whole_benchmark_at_a_tiny_size(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    measured: dict[str, tuple[float, int]],
    quick: bool,
) -> None:
    monkeypatch.setattr(flow, "orders", lambda: measured)
    figure, report = tmp_path / "flow.png", tmp_path / "flow.json"
    options = ["--figure", str(figure), "--json", str(report), *["--quick"] * quick]
    assert flow.main(options, TINY) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(LAST, last)
    figures = json.loads(report.read_text())["figures"]
    assert list(figures["data"]) == (["ring"] if quick else ["ring", "checkerboard", "moons"])
    for table in figures["data"].values():
        assert list(table["methods"]) == list(TITLES)
        for row in table["methods"].values():
            assert list(row["energy_distance"]) == ["1", "2", "4", "8", "32"]
    assert len(figures["bridge"]["samplers"]) == 4 and figures["bridge"]["floor"] > 0
    printed = dict(zip(last.split()[::2], map(float, last.split()[1::2]), strict=True))
    assert printed == pytest.approx(figures["headline"], abs=0.051)
    with Image.open(figure) as drawn:
        assert drawn.width > 700 and len(drawn.convert("L").getcolors() or []) > 8


def test_the_same_seed_gives_the_same_flows() -> None:
    start = noise(20, Generator().manual_seed(0))
    ends: list[list[Tensor]] = []
    for seed in (5, 5, 6):
        methods = Laboratory(DATA["moons"], PLAN, seed, lambda title: None).run()
        ends.append([sample(method.velocity, start, 3) for _, method in methods])
    for first, second, third in zip(*ends, strict=True):
        assert torch.equal(first, second) and not torch.equal(first, third)


def test_orders_are_within_a_tenth_of_theory(measured: dict[str, tuple[float, int]]) -> None:
    assert {"euler", "heun", "midpoint", "rk4"} <= measured.keys()
    for name, (value, theory) in measured.items():
        assert value == pytest.approx(theory, abs=0.1), name


def test_the_exact_flow_reaches_the_floor() -> None:
    """The ring's velocity in closed form: far off in one step, at the floor in 32."""
    exact = as_velocity(
        RectifiedPath(), lambda x, t: RING.predict(RectifiedPath(), "velocity", x.double(), t).float()
    )
    evaluation = Evaluation(DATA["ring"], Sizes(PLAN, points=2000, straight_points=500))
    table = evaluation.table({"flow_matching": Method(exact, 18.0, 0.0)})
    row = table["methods"]["flow_matching"]
    assert row["energy_distance"][32] < 3 * table["floor"] < row["energy_distance"][1] / 100
    assert 2.5 < row["straightness"] < 3.5 and row["own_cost"] < 9
    assert evaluation.paths["flow_matching"].shape == (33, 70, 2)


@pytest.mark.parametrize("path", [RectifiedPath(), LinearBetaPath()], ids=["rectified", "diffusion"])
def test_posterior_means_are_those_of_the_batch(path: FlowPath) -> None:
    """Against Bayes' rule written out; x_t stays where it was."""
    g = Generator().manual_seed(0)
    x0, z, t = (3 * noise(20, g)).double(), noise(20, g).double(), torch.rand(20, generator=g).double()
    mean, rest = posterior_mean(path, x0, z, t)
    alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
    x = alpha * x0 + sigma * z
    for i in range(20):
        weights = [math.exp(-(x[i] - alpha[i] * y).square().sum() / (2 * sigma[i] ** 2)) for y in x0]
        expected = sum(w * y for w, y in zip(weights, x0, strict=True)) / sum(weights)
        torch.testing.assert_close(mean[i], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(alpha * mean + sigma * rest, x)


def test_end_times() -> None:
    """Seven tenths are exactly 1; the density is that of the others."""
    t = EndTimes(0.7).sample(10_000, Generator().manual_seed(0))
    assert int((t == 1).sum()) == 7000 and bool((t > 0).all())
    grid = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    assert EndTimes(0.7).density(grid).mean().item() == pytest.approx(0.3, abs=1e-4)
