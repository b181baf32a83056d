"""Methods that remember the velocities of earlier steps: Adams-Bashforth 2 and 3, and a corrected Heun.

Schedules are shifted, so no two steps have one length: the Adams formulas are those for variable steps. They
ask for one velocity a step, where the step begins, hence never at sigma 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...model.spec import Velocity
from .base import Noise, OnStep, Outcome, Solver, march
from .onestep import StepFunction, heun_step, midpoint_step

Past = Sequence[tuple[float, Tensor]]
"""(sigma, velocity) where the latest steps began, the newest last."""


def adams_bashforth_step(x: Tensor, past: Past, sigma_next: float) -> Tensor:
    """x at the next sigma, from x at `past`'s newest sigma and the one, two or three velocities in `past`.

    The polynomial through these velocities in Newton's form (divided differences), integrated over the step:
    of order len(past). Bashforth and Adams 1883; for variable steps Solving ODEs I, section III.5.
    """
    (sigma, v), *earlier = reversed(past)
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
    """Order 2 or 3 at one evaluation a step. The first step is `first_step`'s, of order - 1, which keeps the
    order of the whole path; the second of Adams-Bashforth 3 is one of Adams-Bashforth 2, for the same reason.
    """

    first_step: StepFunction

    def run(
        self, velocity: Velocity, x: Tensor, path: list[float], on_step: OnStep | None, noise: Noise | None
    ) -> Outcome:
        past: list[tuple[float, Tensor]] = []

        def advance(x: Tensor, v: Tensor, sigma: float, sigma_next: float) -> Tensor:
            past[:] = [*past, (sigma, v)][-self.order :]
            if len(past) == 1:
                return self.first_step(velocity, x, v, sigma, sigma_next)
            return adams_bashforth_step(x, past, sigma_next)

        return march(velocity, x, path, on_step, advance)


@dataclass(frozen=True)
class CorrectedHeun(Solver):
    """Heun's method with a last step that is corrected too, at one evaluation.

    In algorithm 1 of Karras et al. 2022 (arXiv:2206.00364) the step onto sigma 0 remains Euler's: the
    correction would need the velocity at sigma 0. Here that velocity is extrapolated from the last two, which
    makes the step one of Adams-Bashforth 2. A path of a single step has nothing to extrapolate from and is
    taken by the midpoint method.
    """

    def run(
        self, velocity: Velocity, x: Tensor, path: list[float], on_step: OnStep | None, noise: Noise | None
    ) -> Outcome:
        past: list[tuple[float, Tensor]] = []

        def advance(x: Tensor, v: Tensor, sigma: float, sigma_next: float) -> Tensor:
            past[:] = [*past, (sigma, v)][-2:]
            if sigma_next != 0.0:
                return heun_step(velocity, x, v, sigma, sigma_next)
            if len(past) == 1:
                return midpoint_step(velocity, x, v, sigma, sigma_next)
            return adams_bashforth_step(x, past, sigma_next)

        return march(velocity, x, path, on_step, advance)
