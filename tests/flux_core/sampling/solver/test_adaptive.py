"""Dormand-Prince: its order, its tolerance, its report and its limits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from rectiflux.flux_core.sampling.schedule import make_sigmas
from rectiflux.flux_core.sampling.solver import DormandPrince, Report, Step, dormand_prince_step, integrate
from rectiflux.flux_core.sampling.solver.adaptive import ERROR, NODES, STAGES, step_to_zero
from torch import Tensor

from .problems import BENT, FLOW, SWINGING, Problem, doubles

SIGMAS = make_sigmas(20, 256)


def run(problem: Problem, tolerance: float, sigmas: Tensor = SIGMAS) -> tuple[float, Report, list[float]]:
    """(true error, report, evaluated sigmas) of a run from the problem's exact start."""
    reports: list[Report] = []
    evaluated: list[float] = []

    def velocity(x: Tensor, sigma: float) -> Tensor:
        evaluated.append(sigma)
        return problem.velocity(x, sigma)

    solver = DormandPrince(rtol=tolerance, atol=tolerance, max_evaluations=5000)
    start = problem.exact(float(sigmas[0]))
    end = integrate(solver, velocity, start, sigmas, on_report=reports.append)
    return problem.error(end, float(sigmas[-1])), reports[0], evaluated


def test_the_table_is_consistent() -> None:
    """Each stage's weights sum to its node, the difference of two methods to 0; Solving ODEs I, (II.1.9)."""
    for node, weights in zip(NODES, STAGES, strict=True):
        assert sum(weights) == pytest.approx(node, abs=1e-14)
    assert sum(ERROR) == pytest.approx(0, abs=1e-16)


@pytest.mark.parametrize("embedded", [False, True])
def test_measured_order_in_even_steps(embedded: bool) -> None:
    """5, and 4 for the embedded method, whose result is that of the other less the difference."""
    errors = []
    for steps in (64, 128):
        x, v = BENT.exact(1.0), BENT.velocity(BENT.exact(1.0), 1.0)
        for i in range(steps):
            sigma_next = 1 - (i + 1) / steps
            x, v, difference = dormand_prince_step(BENT.velocity, x, v, 1 - i / steps, sigma_next)
            if embedded:
                x = x - difference
                v = BENT.velocity(x, sigma_next)
        errors.append(BENT.error(x))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4 if embedded else 5, abs=0.1)


def test_the_step_to_0_is_of_order_3_with_an_estimate_of_order_2() -> None:
    """Local errors of one step to sigma 0: h^4, and the estimate h^3."""
    errors, estimates = [], []
    for h in (0.02, 0.01):
        x = BENT.exact(h)
        end, estimate = step_to_zero(BENT.velocity, x, BENT.velocity(x, h), h, 0.0)
        errors.append(BENT.error(end))
        estimates.append(float(estimate.norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.1)
    assert math.log2(estimates[0] / estimates[1]) == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("problem", [BENT, FLOW], ids=["bent", "flow"])
def test_the_error_follows_the_tolerance(problem: Problem) -> None:
    """At most 4 times the tolerance at each from 1e-2 to 1e-8, at a growing cost."""
    tolerances = [10.0**-k for k in range(2, 9)]
    runs = [run(problem, tolerance) for tolerance in tolerances]
    for (error, _, _), tolerance in zip(runs, tolerances, strict=True):
        assert error < 4 * tolerance
    assert runs[-1][0] < 1e-4 * runs[0][0]
    assert runs[-1][1].evaluations > 3 * runs[0][1].evaluations


@pytest.mark.parametrize("exponent", range(1, 9))
def test_the_estimated_error_is_close_to_the_true_one(exponent: int) -> None:
    """Within 10 times at usual tolerances; below 1e-5 it overstates, being that of the lower order."""
    error, report, _ = run(FLOW, 10.0**-exponent)
    assert report.error is not None
    low, high = (0.1, 10) if exponent <= 5 else (1, 100)
    assert low * error < report.error < high * error


@pytest.mark.parametrize("problem", [BENT, FLOW, SWINGING], ids=["bent", "flow", "swinging"])
def test_evaluations_are_counted(problem: Problem) -> None:
    """One at the start, six for every accepted or rejected step, two for one to sigma 0."""
    _, report, evaluated = run(problem, 1e-4)
    assert report.evaluations == len(evaluated)
    tried = report.accepted + report.rejected
    to_zero = tried - (report.evaluations - 1 - 2 * tried) / 4
    assert to_zero in range(1, report.rejected + 2)
    assert min(evaluated) > 0


def test_steps_are_rejected_where_the_velocity_swings() -> None:
    error, report, _ = run(SWINGING, 1e-5)
    assert report.rejected >= 3
    assert error < 1e-4
    smooth = run(BENT, 1e-5)[1]
    assert smooth.rejected < report.rejected and smooth.accepted < report.accepted


def test_only_the_ends_of_the_schedule_and_its_first_step_matter() -> None:
    """The first step is the first guess; the middle is not used."""
    once, again = (run(FLOW, 1e-3, doubles(1.0, 0.9, *middle, 0.0))[2] for middle in ((), (0.5, 0.1)))
    assert once == again
    assert once[:3] == [1.0, pytest.approx(1 - 0.1 / 5), pytest.approx(1 - 0.3 / 10)]


def test_a_path_that_ends_above_zero_ends_where_it_should() -> None:
    error, _, evaluated = run(BENT, 1e-6, doubles(0.9, 0.7, 0.2))
    assert error < 1e-5
    assert evaluated[0] == 0.9 and min(evaluated) == evaluated[-1] == 0.2


def test_a_path_of_length_0_evaluates_nothing() -> None:
    x = torch.ones(2)
    solver = DormandPrince()
    assert integrate(solver, lambda x, s: 1 / 0, x, [0.0, 0.0]) is x


def test_every_image_of_a_batch_is_within_the_tolerance() -> None:
    """An image among a thousand easy ones (of velocity 0) gets the same steps as alone."""
    velocity = SWINGING.velocity
    alone = SWINGING.exact(1.0)[None]
    crowd = torch.cat([alone, torch.zeros(1000, 3).double()])
    solver = DormandPrince(rtol=1e-4, atol=1e-4)
    ends = [integrate(solver, velocity, x, SIGMAS) for x in (alone, crowd)]
    torch.testing.assert_close(ends[1][:1], ends[0], rtol=1e-12, atol=1e-12)


def test_steps_report_progress_along_the_schedule() -> None:
    steps: list[Step] = []
    reports: list[Report] = []
    sigmas = doubles(*[1 - i / 10 for i in range(10)], 0.0)
    solver = DormandPrince(rtol=1e-8, atol=1e-8)
    integrate(solver, FLOW.velocity, FLOW.exact(1.0), sigmas, steps.append, on_report=reports.append)
    assert len(steps) == reports[0].accepted > 10
    assert [step.sigma for step in steps[1:]] == [step.sigma_next for step in steps[:-1]]
    for step in steps:
        passed = sum(step.sigma_next <= sigma for sigma in sigmas.tolist()[1:])
        assert (step.index, step.steps) == (max(0, passed - 1), 10)
        assert torch.equal(step.denoised, step.x - step.sigma * FLOW.velocity(step.x, step.sigma))
    assert steps[-1].index == 9


def test_a_limit_of_evaluations_stops_it() -> None:
    calls = 0

    def velocity(x: Tensor, sigma: float) -> Tensor:
        nonlocal calls
        calls += 1
        return SWINGING.velocity(x, sigma)

    with pytest.raises(ValueError, match="40 evaluations"):
        integrate(
            DormandPrince(rtol=1e-8, atol=1e-8, max_evaluations=40), velocity, SWINGING.exact(1.0), SIGMAS
        )
    assert calls == 40


def test_a_velocity_that_is_not_finite_stops_it_at_once() -> None:
    with pytest.raises(ValueError, match="sigma 1 is not finite"):
        integrate(DormandPrince(), lambda x, s: x * math.nan, torch.ones(1), SIGMAS)


def test_a_stage_that_is_not_finite_shortens_the_step() -> None:
    """The velocity is defined for |x| < 1 only, which a long step leaves."""

    def velocity(x: Tensor, sigma: float) -> Tensor:
        return -3 * (1 - x * x).sqrt()  # x = sin(3 (1 - sigma)) until it is 1

    reports: list[Report] = []
    solver = DormandPrince(rtol=1e-6, atol=1e-6)
    end = integrate(solver, velocity, doubles(0.0), [1.0, 0.5, 0.5], on_report=reports.append)
    assert end.item() == pytest.approx(math.sin(1.5), abs=1e-4)
    assert reports[0].rejected > 0


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="rtol .* got 0"):
        DormandPrince(rtol=0)
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"atol .* got {value}"):
            replace(DormandPrince(), atol=value)
    with pytest.raises(ValueError, match="at least 9, got 8"):
        DormandPrince(max_evaluations=8)
