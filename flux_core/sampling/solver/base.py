"""What all solvers share: the path and its steps, the loop over a schedule, and the report of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...model.spec import Velocity

Noise = Callable[[Tensor], Tensor]
"""x -> standard normal noise of its shape, dtype and device, new at every call; see `seeded_noise`."""


@dataclass(frozen=True)
class Step:
    """Step `index` of `steps`, now done: x where it began, and denoised = x - sigma * velocity there.

    A solver that chooses its own steps counts those of the schedule that its path has passed, so that a
    progress bar moves as far as the path has come.
    """

    index: int
    steps: int
    sigma: float
    x: Tensor
    denoised: Tensor
    velocity: Tensor
    sigma_next: float


OnStep = Callable[[Step], None]


@dataclass(frozen=True)
class Outcome:
    """What a solver hands back: x at the end, steps taken and thrown away, the error if it estimates one."""

    x: Tensor
    accepted: int
    rejected: int = 0
    error: float | None = None


@dataclass(frozen=True)
class Solver(ABC):
    """A method to follow a velocity: its name, and the order of its error in the step size."""

    name: str
    order: int

    @property
    def is_random(self) -> bool:
        """Whether a run draws noise on its way, so that its path is no solution of the ODE."""
        return False

    @abstractmethod
    def run(
        self, velocity: Velocity, x: Tensor, path: list[float], on_step: OnStep | None, noise: Noise | None
    ) -> Outcome:
        """The run that `integrate` asks for; `path` has been checked."""

    def evaluation_sigmas(self, sigmas: Tensor | Sequence[float]) -> list[float] | None:
        """Every sigma that `integrate` will ask the velocity for, in that order, repeats included.

        Found by running the method on a number, so it can't disagree with the run. None for a method that
        chooses its steps as it goes.
        """
        asked: list[float] = []

        def record(x: Tensor, sigma: float) -> Tensor:
            asked.append(sigma)
            return x

        self.run(record, torch.zeros(()), checked_path(sigmas), None, torch.zeros_like)
        return asked


def march(
    velocity: Velocity,
    x: Tensor,
    path: list[float],
    on_step: OnStep | None,
    advance: Callable[[Tensor, Tensor, float, float], Tensor],
) -> Outcome:
    """The loop of the methods that take the schedule's own steps.

    `advance` gives x at the next sigma from (x, velocity at x, sigma, next sigma).
    """
    steps = len(path) - 1
    for index, (sigma, sigma_next) in enumerate(zip(path[:-1], path[1:], strict=True)):
        v = velocity(x, sigma)
        x_next = advance(x, v, sigma, sigma_next)
        if on_step is not None:
            on_step(Step(index, steps, sigma, x, x - sigma * v, v, sigma_next))
        x = x_next
    return Outcome(x, steps)


@dataclass(frozen=True)
class Report:
    """What a run cost and what its path was like.

    `error` is the root mean square over all elements of x of the error that the method estimates to have
    made, in the units of x; None for the methods that estimate none. `straightness` is

        S = sum_i |h_i| mean((d - v_i)^2) / sum_i |h_i|,  d = (x_start - x_end) / (sigma_start - sigma_end),

    v_i the velocity where step i (of length h_i) began, the mean over all elements of x. It is the integral
    of Liu et al. 2022 (arXiv:2209.03003, section 2.2: S(Z)) per element and by the sum that Euler makes of
    it: 0 for a straight path, and a figure of this path in these steps, to be compared at the same steps
    only. None for a path that is no ODE's, because noise was added on the way.
    """

    solver: str
    evaluations: int
    accepted: int
    rejected: int
    error: float | None
    straightness: float | None


class _Recorder:
    """Counts a run's evaluations and keeps the mean and variance of its velocities, in float64."""

    def __init__(self, velocity: Velocity, on_step: OnStep | None) -> None:
        self._velocity, self._on_step = velocity, on_step
        self.evaluations = 0
        self._length, self._spread = 0.0, 0.0
        self._mean: Tensor | float = 0.0

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        self.evaluations += 1
        return self._velocity(x, sigma)

    def on_step(self, step: Step) -> None:
        """West's update (1979) of a weighted mean: it keeps its digits where the velocities differ little."""
        v, h = in_double(step.velocity), abs(step.sigma_next - step.sigma)
        if h > 0.0:
            self._length += h
            before = v - self._mean
            self._mean = self._mean + before * (h / self._length)
            self._spread += h * float((before * (v - self._mean)).mean())
        if self._on_step is not None:
            self._on_step(step)

    def straightness(self, start: Tensor, end: Tensor, path: list[float]) -> float | None:
        if path[0] == path[-1]:
            return None
        d = (in_double(start) - in_double(end)) / (path[0] - path[-1])
        return self._spread / self._length + float(((d - self._mean) ** 2).mean())


def in_double(x: Tensor) -> Tensor:
    """A copy in float64 on the CPU: not every device has that dtype."""
    return x.detach().to("cpu", torch.float64)


def integrate(
    solver: Solver,
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    on_step: OnStep | None = None,
    *,
    noise: Noise | None = None,
    on_report: Callable[[Report], None] | None = None,
) -> Tensor:
    """x carried along the ODE from sigmas[0] to sigmas[-1], of the shape and dtype of x.

    `sigmas` may also ascend (from picture to noise). `on_step` is called after every step and may raise to
    interrupt; `on_report` is told at the end what the run was like. `noise` is what a stochastic solver
    draws from. The velocity is asked for with Python floats, so that a sigma is the same key on every device.
    Raises ValueError for fewer than two sigmas, for sigmas outside 0..1, and what the solver raises.
    """
    path = checked_path(sigmas)
    if on_report is None:
        return solver.run(velocity, x, path, on_step, noise).x
    recorder = _Recorder(velocity, on_step)
    end = solver.run(recorder.velocity, x, path, recorder.on_step, noise)
    straightness = None if solver.is_random else recorder.straightness(x, end.x, path)
    on_report(Report(solver.name, recorder.evaluations, end.accepted, end.rejected, end.error, straightness))
    return end.x


def checked_path(sigmas: Tensor | Sequence[float]) -> list[float]:
    """The sigmas as Python floats, checked; see `integrate`."""
    path = [float(sigma) for sigma in (sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas)]
    if len(path) < 2:
        raise ValueError(f"integration needs at least two sigmas (one step), got {len(path)}")
    outside = [sigma for sigma in path if not 0.0 <= sigma <= 1.0]
    if outside:
        raise ValueError(f"sigmas must lie between 0 and 1, got {outside[0]}; use a rectified-flow schedule")
    return path
