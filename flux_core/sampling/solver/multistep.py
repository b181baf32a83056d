"""Methods that use the velocities of earlier steps: Adams-Bashforth 2 and 3, and a corrected Heun.

Schedules are shifted, so all steps differ in length, and the Adams formulas are those for variable steps.
They evaluate the velocity once per step, where the step starts, hence never at sigma 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...model.spec import Velocity
from .base import Noise, OnStep, Result, Solver, fixed_step_loop
from .onestep import StepFunction, heun_step, midpoint_step

History = Sequence[tuple[float, Tensor]]
"""(sigma, velocity) where the latest steps started, the newest last."""


def adams_bashforth_step(x: Tensor, history: History, sigma_next: float) -> Tensor:
    """x at the next sigma, from x at the newest sigma of `history` and its one, two or three velocities.

    The polynomial through these velocities in Newton's form (divided differences), integrated over the step:
    of order len(history). Bashforth and Adams 1883; for variable steps Solving ODEs I, section III.5.
    """
    (sigma, v), *earlier = reversed(history)
    h = sigma_next - sigma
    x = x + h * v
    if not earlier:
        return x
    (sigma_1, v_1), *earlier = earlier
    slope = (v - v_1) / (sigma - sigma_1)
    x = x + h**2 / 2 * slope
    if not earlier:
        return x
    sigma_2, v_2 = earlier[0]
    slope_1 = (v_1 - v_2) / (sigma_1 - sigma_2)
    bend = (slope - slope_1) / (sigma - sigma_2)
    return x + (h**3 / 3 + (sigma - sigma_1) * h**2 / 2) * bend


@dataclass(frozen=True)
class AdamsBashforth(Solver):
    """Order 2 or 3 at one evaluation per step.

    The first step uses `first_step`, of order - 1, which keeps the order of the whole path; the second step
    of Adams-Bashforth 3 is one of Adams-Bashforth 2, for the same reason.
    """

    first_step: StepFunction

    def run(
        self, velocity: Velocity, x: Tensor, path: list[float], on_step: OnStep | None, noise: Noise | None
    ) -> Result:
        history: list[tuple[float, Tensor]] = []

        def advance(x: Tensor, v: Tensor, sigma: float, sigma_next: float) -> Tensor:
            history[:] = [*history, (sigma, v)][-self.order :]
            if len(history) == 1:
                return self.first_step(velocity, x, v, sigma, sigma_next)
            return adams_bashforth_step(x, history, sigma_next)

        return fixed_step_loop(velocity, x, path, on_step, advance)


@dataclass(frozen=True)
class CorrectedHeun(Solver):
    """Heun's method with a corrected last step, at one evaluation.

    In algorithm 1 of Karras et al. 2022 (arXiv:2206.00364) the step to sigma 0 remains Euler's: the
    correction would need the velocity at sigma 0. Here that velocity is extrapolated from the last two, which
    makes it a step of Adams-Bashforth 2. A path of a single step has nothing to extrapolate from; it uses the
    midpoint method.
    """

    def run(
        self, velocity: Velocity, x: Tensor, path: list[float], on_step: OnStep | None, noise: Noise | None
    ) -> Result:
        history: list[tuple[float, Tensor]] = []

        def advance(x: Tensor, v: Tensor, sigma: float, sigma_next: float) -> Tensor:
            history[:] = [*history, (sigma, v)][-2:]
            if sigma_next != 0.0:
                return heun_step(velocity, x, v, sigma, sigma_next)
            if len(history) == 1:
                return midpoint_step(velocity, x, v, sigma, sigma_next)
            return adams_bashforth_step(x, history, sigma_next)

        return fixed_step_loop(velocity, x, path, on_step, advance)
