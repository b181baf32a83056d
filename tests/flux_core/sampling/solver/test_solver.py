"""Solvers: exact where they must be, of the stated order, evaluated only at the listed sigmas."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from rectiflux.flux_core.sampling.schedule import make_sigmas, mu_for_tokens, shift_sigmas
from rectiflux.flux_core.sampling.solver import (
    SOLVERS,
    AdamsBashforth,
    DormandPrince,
    EulerAncestral,
    Solver,
    Step,
    adams_bashforth_step,
    euler_step,
    integrate,
    seeded_noise,
    solver_named,
)
from torch import Tensor

from .problems import BENT, doubles

ALL = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
PLANNED = {name: solver for name, solver in SOLVERS.items() if not isinstance(solver, DormandPrince)}
"""The solvers whose steps are those of the schedule."""
EACH_PLANNED = pytest.mark.parametrize("solver", PLANNED.values(), ids=PLANNED.keys())
ORDERED = [solver for solver in PLANNED.values() if not solver.is_random]
bent = BENT.velocity


def follow(solver: Solver, velocity, x: Tensor, sigmas, on_step=None) -> Tensor:
    """`integrate` with noise for stochastic solvers."""
    return integrate(solver, velocity, x, sigmas, on_step, noise=seeded_noise(3))


def measured_order(solver: Solver, mu: float, counts: tuple[int, int] = (128, 256)) -> float:
    """Slope of log error against log steps on sigmas shifted by mu, from sigma 1 to 0, in float64."""
    errors = []
    for steps in counts:
        sigmas = shift_sigmas(torch.linspace(1, 0, steps + 1, dtype=torch.float64), mu)
        errors.append(BENT.error(integrate(solver, bent, BENT.exact(1.0), sigmas)))
    return math.log(errors[0] / errors[-1]) / math.log(counts[-1] / counts[0])


@pytest.mark.parametrize("solver", ORDERED, ids=lambda solver: solver.name)
@pytest.mark.parametrize("mu", [-1.0, 0.0, 0.5, 1.15, mu_for_tokens(64)])
def test_measured_order_is_the_theory(solver: Solver, mu: float) -> None:
    """On unevenly spaced (shifted) sigmas, including the step to sigma 0, for which some methods use another
    one, and the first steps of multistep methods."""
    assert measured_order(solver, mu) == pytest.approx(solver.order, abs=0.1)


@pytest.mark.parametrize("name", ["ab2", "ab3"])
def test_measured_order_on_steps_that_jump_in_length(name: str) -> None:
    """Every second step is three times as long as the one before, where formulas for even steps fail."""
    errors = []
    for steps in (128, 256):
        lengths = torch.tensor([1.0, 3.0] * (steps // 2), dtype=torch.float64)
        sigmas = 1 - torch.cat([torch.zeros(1).double(), lengths.cumsum(0) / lengths.sum()])
        errors.append(BENT.error(integrate(SOLVERS[name], bent, BENT.exact(1.0), sigmas.clamp(min=0))))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(SOLVERS[name].order, abs=0.1)


def test_a_first_step_of_lower_order_lowers_the_order() -> None:
    """Adams-Bashforth 3 that starts with Euler is of order 2."""
    poor = AdamsBashforth("poor", 3, euler_step)
    assert measured_order(poor, 0.0, (512, 1024)) == pytest.approx(2, abs=0.1)


@ALL
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_a_straight_path_is_followed_exactly(solver: Solver, steps: int) -> None:
    """Noise and image are small binary fractions, so that float64 sums of few steps are exact."""
    noise, image = torch.tensor([1.5, -2.0, 0.25]).double(), torch.tensor([0.5, 3.0, -1.75]).double()
    sigmas = make_sigmas(steps, 256)
    if isinstance(solver, EulerAncestral):  # its noise would change the path
        solver = replace(solver, eta=0.0)
    end = integrate(solver, lambda x, sigma: noise - image, noise, sigmas)
    torch.testing.assert_close(end, image, rtol=0, atol=1e-14)


def test_one_euler_step_gives_the_image() -> None:
    noise, image = torch.tensor([1.5, -2.0]), torch.tensor([0.5, 3.0])
    assert torch.equal(integrate(SOLVERS["euler"], lambda x, s: noise - image, noise, [1.0, 0.0]), image)


@pytest.mark.parametrize(
    ("name", "degree"),
    [("euler", 0), ("heun", 1), ("midpoint", 1), ("rk4", 2), ("heun_corrected", 1), ("ab2", 0), ("ab3", 1)],
)
def test_polynomial_velocities_are_integrated_exactly(name: str, degree: int) -> None:
    """A method of order p integrates s^(p-1) exactly, or s^(p-2) where its first or last step is of order
    p - 1."""
    zero = torch.zeros((), dtype=torch.float64)
    end = integrate(SOLVERS[name], lambda x, s: zero + s**degree, zero, [1, 0.4, 0])
    assert end.item() == pytest.approx(-1 / (degree + 1), abs=1e-15)


def test_one_step_of_each_method_by_hand() -> None:
    """dx/ds = x from s = 1 to 0.5: Taylor's series of e^-0.5 up to the method's order."""
    expected = {"euler": 0.5, "heun": 0.625, "midpoint": 0.625, "rk4": 0.625 - 1 / 48 + 1 / 384}
    expected |= {"heun_corrected": 0.625, "ab2": 0.5, "ab3": 0.625}
    for name, value in expected.items():
        end = integrate(SOLVERS[name], lambda x, s: x, torch.ones(()).double(), [1.0, 0.5])
        assert end.item() == pytest.approx(value, abs=1e-15)


def test_adams_bashforth_by_hand() -> None:
    """Even steps give the textbook's 3/2, -1/2 and 23/12, -16/12, 5/12; velocities s^m are integrated exactly
    up to m = 1 and 2 on uneven ones (their integral from 0.5 to 0.3)."""
    values = doubles(2.0), doubles(-1.0), doubles(5.0)
    past = list(zip((0.8, 0.7, 0.6), values, strict=True))
    two, three = (adams_bashforth_step(doubles(1.0), past[-n:], 0.5).item() for n in (2, 3))
    assert two == pytest.approx(1 - 0.1 * (3 / 2 * 5 - 1 / 2 * -1), abs=1e-14)
    assert three == pytest.approx(1 - 0.1 / 12 * (23 * 5 - 16 * -1 + 5 * 2), abs=1e-14)
    for count in (1, 2, 3):
        for m in range(count):
            past = [(s, doubles(s**m)) for s in (1.0, 0.6, 0.5)][-count:]
            end = adams_bashforth_step(doubles(0.0), past, 0.3).item()
            assert end == pytest.approx((0.3 ** (m + 1) - 0.5 ** (m + 1)) / (m + 1), abs=1e-15)


def test_the_last_step_of_the_corrected_heun_extrapolates_the_velocity() -> None:
    """Two steps from 1 by 0.5 under dx/ds = s^2: Heun's -0.5 (1 + 0.25) / 2, then -0.5 (0.25 - 0.5) / 2, the
    velocity at 0 being 0.25 - 0.75 on the line through 1 and 0.25."""
    end = integrate(SOLVERS["heun_corrected"], lambda x, s: 0 * x + s * s, doubles(0.0), [1.0, 0.5, 0.0])
    assert end.item() == pytest.approx(-0.3125 + 0.0625, abs=1e-15)


@EACH_PLANNED
@pytest.mark.parametrize("denoise", [1.0, 0.4])
def test_evaluation_sigmas_are_those_evaluated(solver: Solver, denoise: float) -> None:
    evaluated: list[float] = []

    def velocity(x: Tensor, sigma: float) -> Tensor:
        evaluated.append(sigma)
        return torch.sin(x) + sigma

    sigmas = make_sigmas(6, 1024, denoise=denoise)
    follow(solver, velocity, torch.randn(2, 3), sigmas)
    assert solver.evaluation_sigmas(sigmas) == evaluated
    assert solver.evaluation_sigmas(sigmas.tolist()) == evaluated
    assert evaluated[0] == float(sigmas[0])
    assert set(sigmas[:-1].tolist()) <= set(evaluated)


def test_a_solver_that_chooses_its_sigmas_lists_none() -> None:
    assert SOLVERS["dormand_prince"].evaluation_sigmas([1.0, 0.0]) is None


def test_evaluations_per_step() -> None:
    """In 5 steps, and in a single one, without history."""
    for steps, expected in (
        (5, {"euler": 5, "heun": 10, "midpoint": 10, "rk4": 19, "heun_corrected": 9, "ab2": 5, "ab3": 6}),
        (1, {"euler": 1, "heun": 2, "midpoint": 2, "rk4": 3, "heun_corrected": 2, "ab2": 1, "ab3": 2}),
    ):
        sigmas = make_sigmas(steps, 256)
        counts = {name: len(solver.evaluation_sigmas(sigmas) or ()) for name, solver in PLANNED.items()}
        assert counts == counts | expected | {"euler_ancestral": steps}


@ALL
def test_sigma_0_is_never_evaluated_while_sigmas_descend(solver: Solver) -> None:
    """So a host that only knows the denoised image, velocity (x - denoised) / sigma, never divides by 0."""
    image = torch.tensor([0.5, -1.0])
    evaluated: list[float] = []

    def velocity(x: Tensor, sigma: float) -> Tensor:
        evaluated.append(sigma)
        return (x - image) / sigma

    for steps in (1, 3, 30):
        end = follow(solver, velocity, torch.tensor([2.0, 2.0]), make_sigmas(steps, 4096))
        assert min(evaluated) > 0
        torch.testing.assert_close(end, image, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", [*ORDERED, DormandPrince(rtol=1e-5, atol=1e-5)], ids=lambda s: s.name)
def test_ascending_sigmas_reach_the_noise(solver: Solver) -> None:
    sigmas = torch.linspace(0, 1, 65, dtype=torch.float64)
    end = integrate(solver, bent, BENT.exact(0.0)[1], sigmas)
    assert end.item() == pytest.approx(BENT.exact(1.0)[1].item(), abs=2e-2 if solver.order == 1 else 1e-4)


@EACH_PLANNED
def test_steps_are_reported(solver: Solver) -> None:
    """x is where the step started; denoised is the end of a straight path from there."""
    seen: list[Step] = []
    sigmas = make_sigmas(4, 256)
    start = BENT.exact(1.0)
    follow(solver, bent, start, sigmas, seen.append)
    assert [(step.index, step.steps) for step in seen] == [(i, 4) for i in range(4)]
    assert [step.sigma for step in seen] == sigmas[:-1].tolist()
    assert [step.sigma_next for step in seen] == sigmas[1:].tolist()
    assert seen[0].x is start
    for step in seen:
        assert torch.equal(step.velocity, bent(step.x, step.sigma))
        assert torch.equal(step.denoised, step.x - step.sigma * step.velocity)


@EACH_PLANNED
def test_repeated_sigmas_are_no_steps(solver: Solver) -> None:
    """At 4800 x 4800 px the shift leaves several float32 sigmas of 1."""
    sigmas = make_sigmas(28, 300 * 300).tolist()
    assert sigmas[1] == 1.0
    distinct = [1.0, *(sigma for sigma in sigmas if sigma < 1.0)]
    x = BENT.exact(1.0)
    ends = [follow(solver, bent, x, path) for path in (sigmas, distinct)]
    assert ends[0].isfinite().all() and torch.equal(*ends)
    assert solver.evaluation_sigmas(sigmas) == solver.evaluation_sigmas(distinct)


def test_a_callback_can_interrupt() -> None:
    class Interrupted(Exception):
        pass

    calls = 0

    def velocity(x: Tensor, sigma: float) -> Tensor:
        nonlocal calls
        calls += 1
        return x

    def stop(step: Step) -> None:
        if step.index == 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        integrate(SOLVERS["euler"], velocity, torch.ones(1), make_sigmas(9, 256), stop)
    assert calls == 2


@ALL
def test_the_dtype_of_x_is_kept(solver: Solver) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert follow(solver, bent, torch.ones(2, dtype=dtype), make_sigmas(3, 256)).dtype == dtype


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="euler, heun, .* got 'dpm'"):
        solver_named("dpm")
    assert solver_named("heun") is SOLVERS["heun"]
    with pytest.raises(ValueError, match="at least two sigmas .* got 1"):
        integrate(SOLVERS["euler"], bent, torch.ones(1), [1.0])
    for sigma in (14.6, -0.1, math.nan):
        with pytest.raises(ValueError, match=f"between 0 and 1, got {sigma}"):
            integrate(SOLVERS["euler"], bent, torch.ones(1), torch.tensor([sigma, 0.0], dtype=torch.float64))
