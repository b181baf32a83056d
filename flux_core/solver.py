"""ODE solvers for dx/dsigma = velocity(x, sigma), one short function each.

A solver sees a `Velocity` and a list of sigmas, nothing of the model. No step that lands on sigma 0 asks
for the velocity there: a host that only gives the denoised picture has velocity = (x - denoised) / sigma,
which is 0/0 at the end. Heun and RK4, which would ask, take that one step by another method whose nodes lie
inside the step (`last_step`). A single step may have a local error of h^p without lowering the order p of
the whole path (the steps shrink together; compare Hairer, Norsett and Wanner, Solving ODEs I, section
II.3), so there a method of order p - 1 is enough; the tests measure the order with that step included.

Not here: stochastic, multistep and adaptive methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .spec import Velocity

StepFunction = Callable[[Velocity, Tensor, Tensor, float, float], Tensor]
"""(velocity, x, velocity at x, sigma, next sigma) -> x at the next sigma."""


def euler_step(velocity: Velocity, x: Tensor, v: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Order 1, one evaluation; exact on straight paths. Euler 1768; Solving ODEs I, section I.7."""
    return x + (sigma_next - sigma) * v


def heun_step(velocity: Velocity, x: Tensor, v: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Order 2, two evaluations, at both ends. Karras et al. 2022 (arXiv:2206.00364), algorithm 1."""
    h = sigma_next - sigma
    v_end = velocity(x + h * v, sigma_next)
    return x + h / 2 * (v + v_end)


def midpoint_step(velocity: Velocity, x: Tensor, v: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Order 2, two evaluations, the second in mid-step. Runge 1895; Solving ODEs I, section II.1."""
    h = sigma_next - sigma
    return x + h * velocity(x + h / 2 * v, sigma + h / 2)


def ralston3_step(velocity: Velocity, x: Tensor, v: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Order 3, evaluations at 0, 1/2 and 3/4 of the step. Ralston 1962 (Math. Comp. 16, 431-437)."""
    h = sigma_next - sigma
    v2 = velocity(x + h / 2 * v, sigma + h / 2)
    v3 = velocity(x + 3 * h / 4 * v2, sigma + 3 * h / 4)
    return x + h / 9 * (2 * v + 3 * v2 + 4 * v3)


def rk4_step(velocity: Velocity, x: Tensor, v: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Order 4, four evaluations: the classical method. Kutta 1901; Solving ODEs I, table II.1.2."""
    h = sigma_next - sigma
    v2 = velocity(x + h / 2 * v, sigma + h / 2)
    v3 = velocity(x + h / 2 * v2, sigma + h / 2)
    v4 = velocity(x + h * v3, sigma_next)
    return x + h / 6 * (v + 2 * v2 + 2 * v3 + v4)


@dataclass(frozen=True)
class Step:
    """Step `index` of `steps`, now done: x where it began, and denoised = x - sigma * velocity there."""

    index: int
    steps: int
    sigma: float
    x: Tensor
    denoised: Tensor


@dataclass(frozen=True)
class Solver:
    """A method: the order of its error in the step size, its step, and the step it takes onto sigma 0."""

    name: str
    order: int
    step: StepFunction
    last_step: StepFunction

    def evaluation_sigmas(self, sigmas: Tensor | Sequence[float]) -> list[float]:
        """Every sigma that `integrate` will ask the velocity for, in that order, repeats included.

        Found by running the method on a number, so it can't disagree with the run.
        """
        asked: list[float] = []

        def record(x: Tensor, sigma: float) -> Tensor:
            asked.append(sigma)
            return x

        integrate(self, record, torch.zeros(()), sigmas)
        return asked


SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver("euler", 1, euler_step, euler_step),
        Solver("heun", 2, heun_step, midpoint_step),
        Solver("midpoint", 2, midpoint_step, midpoint_step),
        Solver("rk4", 4, rk4_step, ralston3_step),
    )
}
"""The solvers by name, in the order in which a menu shows them."""


def solver_named(name: str) -> Solver:
    """The solver of that name. Raises ValueError with the names there are."""
    if name not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {name!r}")
    return SOLVERS[name]


def integrate(
    solver: Solver,
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    on_step: Callable[[Step], None] | None = None,
) -> Tensor:
    """x carried along the ODE from sigmas[0] to sigmas[-1], of the shape and dtype of x.

    `sigmas` may also ascend (from picture to noise). `on_step` is called after every step and may raise to
    interrupt. The velocity is asked for with Python floats, so that a sigma is the same key on every device.
    Raises ValueError for fewer than two sigmas and for sigmas outside 0..1.
    """
    path = _checked(sigmas)
    steps = len(path) - 1
    for index, (sigma, sigma_next) in enumerate(zip(path[:-1], path[1:], strict=True)):
        v = velocity(x, sigma)
        step = solver.last_step if sigma_next == 0.0 else solver.step
        x_next = step(velocity, x, v, sigma, sigma_next)
        if on_step is not None:
            on_step(Step(index, steps, sigma, x, x - sigma * v))
        x = x_next
    return x


def _checked(sigmas: Tensor | Sequence[float]) -> list[float]:
    """The sigmas as Python floats, checked."""
    path = [float(sigma) for sigma in (sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas)]
    if len(path) < 2:
        raise ValueError(f"integration needs at least two sigmas (one step), got {len(path)}")
    outside = [sigma for sigma in path if not 0.0 <= sigma <= 1.0]
    if outside:
        raise ValueError(f"sigmas must lie between 0 and 1, got {outside[0]}; use a rectified-flow schedule")
    return path
