"""One-step methods: Euler, Heun, midpoint, Ralston, RK4.

A step that ends at sigma 0 does not evaluate the velocity there. Heun and RK4, which would, use another
method for that step, whose nodes lie inside it (`last_step`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...model.spec import Velocity
from .base import Noise, OnStep, Result, Solver, fixed_step_loop

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
    """Order 2, two evaluations, the second at the middle. Runge 1895; Solving ODEs I, section II.1."""
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
class OneStep(Solver):
    """A method of one step function, and another for the step that ends at sigma 0."""

    step: StepFunction
    last_step: StepFunction

    def run(
        self, velocity: Velocity, x: Tensor, path: list[float], on_step: OnStep | None, noise: Noise | None
    ) -> Result:
        def advance(x: Tensor, v: Tensor, sigma: float, sigma_next: float) -> Tensor:
            step = self.last_step if sigma_next == 0.0 else self.step
            return step(velocity, x, v, sigma, sigma_next)

        return fixed_step_loop(velocity, x, path, on_step, advance)
