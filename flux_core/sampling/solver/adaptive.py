"""Dormand and Prince's method, which chooses its own steps so that each error is within a tolerance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...model.spec import Velocity
from .base import Noise, OnStep, Result, Solver, Step, in_double

# Dormand and Prince 1980 (J. Comp. Appl. Math. 6, 19-26); Solving ODEs I, table II.5.2
NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
"""Weights of the earlier velocities in each stage. The last stage is the end of the step, of order 5."""
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
"""Weights of the velocities in the difference between order 5 and the embedded order 4."""

SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0
BETA = 0.04
"""The integral part of the step control; Hairer and Wanner's dopri5, Solving ODEs II, section IV.2."""


def dormand_prince_step(
    velocity: Velocity, x: Tensor, v: Tensor, sigma: float, sigma_next: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(x at the next sigma, of order 5; velocity there; difference from order 4), six evaluations."""
    h = sigma_next - sigma
    slopes, stage = [v], x
    for node, weights in zip(NODES, STAGES, strict=True):
        stage = x + h * _weighted_sum(weights, slopes)
        slopes.append(velocity(stage, sigma_next if node == 1.0 else sigma + node * h))
    return stage, slopes[-1], h * _weighted_sum(ERROR, slopes)


def step_to_zero(
    velocity: Velocity, x: Tensor, v: Tensor, sigma: float, sigma_next: float
) -> tuple[Tensor, Tensor]:
    """(x at the next sigma, of order 3; difference from order 2), two evaluations inside the step.

    Ralston's third-order method (1962) contains the midpoint method, which is its embedded one here.
    """
    h = sigma_next - sigma
    v2 = velocity(x + h / 2 * v, sigma + h / 2)
    v3 = velocity(x + 3 * h / 4 * v2, sigma + 3 * h / 4)
    return x + h / 9 * (2 * v + 3 * v2 + 4 * v3), h / 9 * (2 * v - 6 * v2 + 4 * v3)


def _weighted_sum(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    return sum((w * v for w, v in zip(weights, slopes, strict=True) if w), torch.zeros_like(slopes[0]))


@dataclass(frozen=True)
class DormandPrince(Solver):
    """Order 5 with an embedded order 4, six evaluations per step, from the first sigma to the last.

    Of the schedule it uses the ends and, as a first guess, the first step. A step is accepted when the root
    mean square over an image of error / (atol + rtol |x|) is at most 1 for every image of the batch (Solving
    ODEs I, section II.4). The velocity at the end of an accepted step is reused by the next. The step to
    sigma 0 is Ralston's of order 3, with its own error estimate and within the same tolerance: while sigmas
    descend, the velocity is never evaluated at sigma 0.

    The reported error is the sum of the estimates of the accepted steps. It ignores how the velocity
    propagates errors, and estimates those of the lower order, so as a rule it overstates. Raises ValueError
    for tolerances that are not above 0, for fewer than 9 evaluations and, in a run, when `max_evaluations` do
    not suffice or the velocity is not finite.
    """

    name: str = "dormand_prince"
    order: int = 5
    rtol: float = 2e-2
    atol: float = 2e-2
    max_evaluations: int = 500

    def __post_init__(self) -> None:
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if not 0.0 < value < math.inf:
                raise ValueError(f"{name} must be finite and above 0, got {value}; 0.02 is usual")
        if self.max_evaluations < 9:
            raise ValueError(f"max_evaluations must be at least 9, got {self.max_evaluations}")

    def evaluation_sigmas(self, sigmas: Tensor | Sequence[float]) -> list[float] | None:
        """None: they depend on x."""
        return None

    def run(
        self, velocity: Velocity, x: Tensor, path: list[float], on_step: OnStep | None, noise: Noise | None
    ) -> Result:
        if path[0] == path[-1]:
            return Result(x, 0, 0, 0.0)
        state = _State(self, velocity, x, path)
        while state.sigma != state.path[-1]:
            step = state.try_step()
            if step is not None and on_step is not None:
                on_step(step)
        error = float(in_double(state.error).square().mean().sqrt())
        return Result(state.x, state.accepted, state.rejected, error)


class _State:
    """State of one run of DormandPrince: x, sigma, and the length of the next step."""

    def __init__(self, solver: DormandPrince, velocity: Velocity, x: Tensor, path: list[float]) -> None:
        self.solver, self.velocity, self.x, self.path = solver, velocity, x, path
        self.sigma = path[0]
        self.length = abs(path[1] - path[0]) or abs(path[-1] - path[0])
        self.last_start = 0.0  # sigma to step to 0 from; 0 until a step to 0 has been rejected
        self.accepted = self.rejected = self.evaluations = 0
        self.error = torch.zeros_like(x)
        self.ratio = 1.0  # the last step's error over its tolerance
        self.just_rejected = False  # then the next step does not grow
        self.v = self.evaluate(x, self.sigma)
        if not bool(torch.isfinite(self.v).all()):
            raise ValueError(
                f"the velocity at sigma {self.sigma:.4g} is not finite, so no step is short enough; "
                "the weights are damaged or too large, choose bf16 or fp32"
            )

    def evaluate(self, x: Tensor, sigma: float) -> Tensor:
        """The velocity, counted. Raises ValueError beyond `max_evaluations`."""
        if self.evaluations == self.solver.max_evaluations:
            raise ValueError(
                f"{self.solver.name} has used its {self.evaluations} evaluations and is at sigma "
                f"{self.sigma:.4g} on the way to {self.path[-1]:.4g}; raise rtol and atol, or max_evaluations"
            )
        self.evaluations += 1
        return self.velocity(x, sigma)

    def try_step(self) -> Step | None:
        """Compute a step; returns it if it is accepted."""
        end = self.path[-1]
        remaining = abs(end - self.sigma)
        near_end = 1.01 * self.length >= remaining
        if end == 0.0 and (remaining <= self.last_start or (not self.last_start and near_end)):
            x, error = step_to_zero(self.evaluate, self.x, self.v, self.sigma, end)
            return self._accept_or_reject(x, self.v, error, end, 3)
        target = self.last_start or end
        distance = target - self.sigma
        if 1.01 * self.length < abs(distance):
            target = self.sigma + math.copysign(self.length, distance)
        x, v, error = dormand_prince_step(self.evaluate, self.x, self.v, self.sigma, target)
        return self._accept_or_reject(x, v, error, target, 5)

    def _accept_or_reject(self, x: Tensor, v: Tensor, error: Tensor, sigma: float, power: int) -> Step | None:
        """Accept the step to `sigma`, or shorten it: its error is proportional to length^`power`."""
        length, ratio = abs(sigma - self.sigma), self._error_ratio(x, error)
        if ratio > 1.0:
            self.rejected, self.just_rejected = self.rejected + 1, True
            shorter = length * max(SHRINK, SAFETY * ratio ** (-1 / power))
            if sigma == 0.0:
                self.last_start = shorter
            else:
                self.length = shorter
            return None
        step = self._step(sigma)
        factor = SAFETY * ratio ** -(1 / power - 0.75 * BETA) * self.ratio**BETA
        self.length = length * min(1.0 if self.just_rejected else GROW, max(SHRINK, factor))
        self.x, self.v, self.sigma = x, v, sigma
        self.error = self.error + error
        self.accepted, self.ratio, self.just_rejected = self.accepted + 1, ratio, False
        return step

    def _error_ratio(self, x: Tensor, error: Tensor) -> float:
        """Error over tolerance, the largest of the batch; inf where it is not finite."""
        size = torch.maximum(self.x.abs(), x.abs())
        ratio = error / (self.solver.atol + self.solver.rtol * size)
        rows = ratio.to(torch.promote_types(ratio.dtype, torch.float32))
        rows = rows.flatten(1) if rows.ndim > 1 else rows.reshape(1, -1)
        largest = float(rows.square().mean(1).sqrt().max())
        return max(largest, 1e-10) if math.isfinite(largest) else math.inf

    def _step(self, sigma: float) -> Step:
        """The step from here to `sigma`, as progress along the schedule; see `Step`."""
        steps = len(self.path) - 1
        whole = self.path[-1] - self.path[0]
        passed = sum((sigma - node) / whole >= 0.0 for node in self.path[1:])
        denoised = self.x - self.sigma * self.v
        return Step(max(0, passed - 1), steps, self.sigma, self.x, denoised, self.v, sigma)
