"""The report of a run: evaluations, steps, straightness."""

from __future__ import annotations

import pytest
import torch
from rectiflux.flux_core.sampling.schedule import make_sigmas
from rectiflux.flux_core.sampling.solver import (
    SOLVERS,
    DormandPrince,
    EulerAncestral,
    Report,
    integrate,
    seeded_noise,
)
from torch import Tensor

from .problems import BENT, doubles


def report(solver, velocity, x: Tensor, sigmas) -> Report:
    reports: list[Report] = []
    integrate(solver, velocity, x, sigmas, noise=seeded_noise(1), on_report=reports.append)
    assert len(reports) == 1
    return reports[0]


def test_straightness_by_hand() -> None:
    """Two elements in three steps of lengths 0.5, 0.25, 0.25, by Euler.

    Velocities (2, 1), (4, 1), (0, 5) give d = (2, 2), so S is 0.5 (0 + 1) / 2 + 0.25 (4 + 1) / 2
    + 0.25 (4 + 9) / 2.
    """
    velocities = {1.0: doubles(2, 1), 0.5: doubles(4, 1), 0.25: doubles(0, 5)}
    found = report(SOLVERS["euler"], lambda x, s: velocities[s], doubles(7, 7), [1.0, 0.5, 0.25, 0.0])
    assert found.straightness == pytest.approx(0.25 + 0.625 + 1.625, abs=1e-15)
    assert found == Report("euler", 3, 3, 0, None, found.straightness)


def test_straightness_of_part_of_a_path() -> None:
    """From 0.6 to 0.2 in two even steps with velocities 1 and 3: d = 2, S = 1, whatever the length."""
    velocities = {0.6: 1.0, 0.4: 3.0}
    found = report(SOLVERS["euler"], lambda x, s: x * 0 + velocities[s], doubles(5), [0.6, 0.4, 0.2])
    assert found.straightness == pytest.approx(1, abs=1e-12)


def test_straightness_of_a_two_stage_method() -> None:
    """One midpoint step, velocity 1 at its start and 3 at its middle: d = 3, S = (3 - 1)^2."""
    found = report(SOLVERS["midpoint"], lambda x, s: x * 0 + (1.0 if s == 1 else 3.0), doubles(0), [1.0, 0.0])
    assert found.straightness == pytest.approx(4, abs=1e-14)
    assert (found.evaluations, found.accepted) == (2, 1)


def test_a_straight_path_has_straightness_0() -> None:
    for name in SOLVERS:
        found = report(SOLVERS[name], lambda x, s: doubles(2, -1), doubles(1, 0), make_sigmas(4, 256))
        assert found.straightness == (None if name == "euler_ancestral" else pytest.approx(0, abs=1e-28))


def test_straightness_is_accurate_where_the_path_is_nearly_straight() -> None:
    """Velocities 1000 and 1000 + 2^-10 in float32: S is the variance 2^-22, a millionth of a millionth."""
    velocities = {1.0: 1000.0, 0.5: 1000.0 + 2.0**-10}
    start = torch.zeros(3)
    found = report(SOLVERS["euler"], lambda x, s: torch.full_like(x, velocities[s]), start, [1.0, 0.5, 0.0])
    assert found.straightness == pytest.approx(2.0**-22, rel=1e-2)


@pytest.mark.parametrize("name", SOLVERS)
def test_evaluations_and_steps(name: str) -> None:
    evaluated: list[float] = []

    def velocity(x: Tensor, sigma: float) -> Tensor:
        evaluated.append(sigma)
        return BENT.velocity(x, sigma)

    found = report(SOLVERS[name], velocity, BENT.exact(1.0), make_sigmas(6, 256))
    assert (found.solver, found.evaluations) == (name, len(evaluated))
    if name != "dormand_prince":
        assert (found.accepted, found.rejected, found.error) == (6, 0, None)
    else:  # each step's at most rtol (1 + |x|), and |x| falls from 1.6
        assert found.error is not None and 0 < found.error <= found.accepted * 0.02 * (1 + 1.6)


def test_a_path_with_added_noise_has_no_straightness() -> None:
    x, sigmas = BENT.exact(1.0), make_sigmas(6, 256)
    assert report(SOLVERS["euler_ancestral"], BENT.velocity, x, sigmas).straightness is None
    plain = report(SOLVERS["euler"], BENT.velocity, x, sigmas).straightness
    assert report(EulerAncestral(eta=0.0), BENT.velocity, x, sigmas).straightness == plain


def test_a_path_of_length_0_has_no_straightness() -> None:
    for solver in (SOLVERS["euler"], DormandPrince()):
        assert report(solver, BENT.velocity, BENT.exact(0.5), [0.5, 0.5]).straightness is None


def test_the_report_changes_nothing() -> None:
    for solver in SOLVERS.values():
        ends = [
            integrate(
                solver,
                BENT.velocity,
                BENT.exact(1.0),
                make_sigmas(5, 256),
                noise=seeded_noise(1),
                on_report=on_report,
            )
            for on_report in (None, lambda report: None)
        ]
        assert torch.equal(*ends)
