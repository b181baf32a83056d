"""Solvers: exact where they must be, of the order they claim, asking only for the sigmas they announce."""

from __future__ import annotations

import math

import pytest
import torch
from rectiflux.flux_core.schedule import make_sigmas, mu_for_tokens, shift_sigmas
from rectiflux.flux_core.solver import SOLVERS, Solver, Step, integrate, solver_named
from torch import Tensor

ALL = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


def bent(x: Tensor, sigma: float) -> Tensor:
    """Velocity of dx/ds = x^2 cos(s): nonlinear, and solved by x(s) = 1 / (c - sin(s))."""
    return x * x * math.cos(sigma)


def exact(sigma: float) -> float:
    return 1 / (2.0 - math.sin(sigma))


def measured_order(solver: Solver, mu: float) -> float:
    """Slope of log error against log steps on sigmas shifted by mu, from sigma 1 to 0, in float64."""
    counts = (128, 256)
    errors = []
    for steps in counts:
        sigmas = shift_sigmas(torch.linspace(1, 0, steps + 1, dtype=torch.float64), mu)
        end = integrate(solver, bent, torch.tensor(exact(1.0), dtype=torch.float64), sigmas)
        errors.append(abs(end.item() - exact(0.0)))
    return math.log(errors[0] / errors[-1]) / math.log(counts[-1] / counts[0])


@ALL
@pytest.mark.parametrize("mu", [0.0, 0.5, 1.15, mu_for_tokens(64)])
def test_measured_order_is_the_theory(solver: Solver, mu: float) -> None:
    """The step onto sigma 0, which Heun and RK4 take by another method, is part of what is measured."""
    assert measured_order(solver, mu) == pytest.approx(solver.order, abs=0.1)


@ALL
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_a_straight_path_is_followed_exactly(solver: Solver, steps: int) -> None:
    """Noise and picture are small binary fractions, so that float64 makes no error in a sum of few steps."""
    noise, picture = torch.tensor([1.5, -2.0, 0.25]).double(), torch.tensor([0.5, 3.0, -1.75]).double()
    sigmas = make_sigmas(steps, 256)
    end = integrate(solver, lambda x, sigma: noise - picture, noise, sigmas)
    torch.testing.assert_close(end, picture, rtol=0, atol=1e-14)


def test_euler_takes_one_step_to_the_picture() -> None:
    noise, picture = torch.tensor([1.5, -2.0]), torch.tensor([0.5, 3.0])
    assert torch.equal(integrate(SOLVERS["euler"], lambda x, s: noise - picture, noise, [1.0, 0.0]), picture)


@pytest.mark.parametrize(("name", "degree"), [("euler", 0), ("heun", 1), ("midpoint", 1), ("rk4", 2)])
def test_polynomial_velocities_are_integrated_exactly(name: str, degree: int) -> None:
    """A method of order p integrates s^(p-1) exactly; RK4's last step is of order 3, so s^2 is its limit."""
    zero = torch.zeros((), dtype=torch.float64)
    end = integrate(SOLVERS[name], lambda x, s: zero + s**degree, zero, [1, 0.4, 0])
    assert end.item() == pytest.approx(-1 / (degree + 1), abs=1e-15)


def test_one_step_of_each_method_by_hand() -> None:
    """dx/ds = x from s = 1 to 0.5: Taylor's series of e^-0.5 up to the method's order."""
    expected = {"euler": 0.5, "heun": 0.625, "midpoint": 0.625, "rk4": 0.625 - 1 / 48 + 1 / 384}
    for name, value in expected.items():
        end = integrate(SOLVERS[name], lambda x, s: x, torch.ones(()).double(), [1.0, 0.5])
        assert end.item() == pytest.approx(value, abs=1e-15)


@ALL
@pytest.mark.parametrize("denoise", [1.0, 0.4])
def test_announced_sigmas_are_those_asked_for(solver: Solver, denoise: float) -> None:
    asked: list[float] = []

    def velocity(x: Tensor, sigma: float) -> Tensor:
        asked.append(sigma)
        return torch.sin(x) + sigma

    sigmas = make_sigmas(6, 1024, denoise=denoise)
    integrate(solver, velocity, torch.randn(2, 3), sigmas)
    assert solver.evaluation_sigmas(sigmas) == asked
    assert solver.evaluation_sigmas(sigmas.tolist()) == asked
    assert asked[0] == float(sigmas[0])
    assert set(sigmas[:-1].tolist()) <= set(asked)


def test_evaluations_per_step() -> None:
    sigmas = make_sigmas(5, 256)
    counts = {name: len(solver.evaluation_sigmas(sigmas)) for name, solver in SOLVERS.items()}
    assert counts == {"euler": 5, "heun": 10, "midpoint": 10, "rk4": 19}


@ALL
def test_sigma_zero_is_never_asked_for_on_the_way_down(solver: Solver) -> None:
    """So a host that knows only the denoised picture, velocity (x - denoised) / sigma, divides by no 0."""
    picture = torch.tensor([0.5, -1.0])
    for steps in (1, 3, 30):
        sigmas = make_sigmas(steps, 4096)
        assert min(solver.evaluation_sigmas(sigmas)) > 0
        end = integrate(solver, lambda x, sigma: (x - picture) / sigma, torch.tensor([2.0, 2.0]), sigmas)
        torch.testing.assert_close(end, picture, rtol=1e-5, atol=1e-5)


@ALL
def test_the_way_back_reaches_the_noise(solver: Solver) -> None:
    sigmas = torch.linspace(0, 1, 65, dtype=torch.float64)
    end = integrate(solver, bent, torch.tensor(exact(0.0), dtype=torch.float64), sigmas)
    assert end.item() == pytest.approx(exact(1.0), abs=2e-2 if solver.order == 1 else 1e-4)


@ALL
def test_steps_are_reported(solver: Solver) -> None:
    """x is where the step began; denoised is what it would be if the path were straight from there."""
    seen: list[Step] = []
    sigmas = make_sigmas(4, 256)
    start = torch.tensor(exact(1.0))
    integrate(solver, bent, start, sigmas, seen.append)
    assert [(step.index, step.steps) for step in seen] == [(i, 4) for i in range(4)]
    assert [step.sigma for step in seen] == sigmas[:-1].tolist()
    assert seen[0].x is start
    for step in seen:
        assert torch.equal(step.denoised, step.x - step.sigma * bent(step.x, step.sigma))


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
        assert integrate(solver, bent, torch.ones(2, dtype=dtype), make_sigmas(3, 256)).dtype == dtype


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="solver must be one of euler, heun, midpoint, rk4, got 'dpm'"):
        solver_named("dpm")
    assert solver_named("heun") is SOLVERS["heun"]
    with pytest.raises(ValueError, match=r"needs at least two sigmas \(one step\), got 1"):
        integrate(SOLVERS["euler"], bent, torch.ones(1), [1.0])
    for sigma in (14.6, -0.1, math.nan):
        with pytest.raises(ValueError, match=f"sigmas must lie between 0 and 1, got {sigma}"):
            integrate(SOLVERS["euler"], bent, torch.ones(1), torch.tensor([sigma, 0.0], dtype=torch.float64))
