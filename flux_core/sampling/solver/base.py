"""What all solvers share: steps, the loop over a schedule, `integrate`, and the report of a run."""

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
    """Step `index` of `steps`, completed: x where it started, and denoised = x - sigma * velocity there.

    A solver that chooses its own steps counts the steps of the schedule that it has passed, so that a
    progress bar shows how far it is.
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
class Result:
    """x at the end, the numbers of accepted and rejected steps, and the error if the method estimates it."""

    x: Tensor
    accepted: int
    rejected: int = 0
    error: float | None = None


@dataclass(frozen=True)
class Solver(ABC):
    """A method that integrates a velocity: its name, and the order of its error in the step size."""

    name: str
    order: int

    @property
    def is_random(self) -> bool:
        """Whether a run adds noise, so that its path does not solve the ODE."""
        return False

    @abstractmethod
    def run(
        self, velocity: Velocity, x: Tensor, path: list[float], on_step: OnStep | None, noise: Noise | None
    ) -> Result:
        """Integrate along `path`, the checked sigmas; see `integrate`."""

    def evaluation_sigmas(self, sigmas: Tensor | Sequence[float]) -> list[float] | None:
        """Every sigma at which `integrate` will evaluate the velocity, in order, with repeats.

        Recorded from a run of the method on a scalar, so it always agrees with the run. None for a method
        that chooses its steps during the run.
        """
        evaluated: list[float] = []

        def record(x: Tensor, sigma: float) -> Tensor:
            evaluated.append(sigma)
            return x

        self.run(record, torch.zeros(()), checked_path(sigmas), None, torch.zeros_like)
        return evaluated


def fixed_step_loop(
    velocity: Velocity,
    x: Tensor,
    path: list[float],
    on_step: OnStep | None,
    advance: Callable[[Tensor, Tensor, float, float], Tensor],
) -> Result:
    """The loop of the methods whose steps are those of the schedule.

    `advance` returns x at the next sigma from (x, velocity at x, sigma, next sigma). A repeated sigma, as
    float32 leaves them where a schedule is shifted far, is no step.
    """
    steps, taken = len(path) - 1, 0
    for index, (sigma, sigma_next) in enumerate(zip(path[:-1], path[1:], strict=True)):
        if sigma == sigma_next:
            continue
        taken += 1
        v = velocity(x, sigma)
        x_next = advance(x, v, sigma, sigma_next)
        if on_step is not None:
            on_step(Step(index, steps, sigma, x, x - sigma * v, v, sigma_next))
        x = x_next
    return Result(x, taken)


@dataclass(frozen=True)
class Report:
    """Cost of a run, estimated error and straightness of its path.

    `error` is the root mean square over all elements of x of the method's own error estimate, in the units of
    x; None for methods without one. `straightness` is

        S = sum_i |h_i| mean((d - v_i)^2) / sum_i |h_i|,  d = (x_start - x_end) / (sigma_start - sigma_end),

    v_i the velocity where step i (of length h_i) started, the mean over all elements of x. It is S(Z) of Liu
    et al. 2022 (arXiv:2209.03003, section 2.2) per element, its integral approximated by Euler's sum: 0 for a
    straight path, and comparable only between runs with the same steps. None where noise was added, because
    the path then does not solve an ODE.
    """

    solver: str
    evaluations: int
    accepted: int
    rejected: int
    error: float | None
    straightness: float | None


class _Recorder:
    """Counts a run's evaluations and updates the mean and variance of its velocities, in float64."""

    def __init__(self, velocity: Velocity, on_step: OnStep | None) -> None:
        self._velocity, self._on_step = velocity, on_step
        self.evaluations = 0
        self._length, self._spread = 0.0, 0.0
        self._mean: Tensor | float = 0.0

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        self.evaluations += 1
        return self._velocity(x, sigma)

    def on_step(self, step: Step) -> None:
        """West's update (1979) of a weighted mean, accurate where the velocities differ little."""
        v, h = in_double(step.velocity), abs(step.sigma_next - step.sigma)
        if h > 0.0:
            self._length += h
            difference = v - self._mean
            self._mean = self._mean + difference * (h / self._length)
            self._spread += h * float((difference * (v - self._mean)).mean())
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
    """Solution of the ODE at sigmas[-1] that starts from x at sigmas[0], of the shape and dtype of x.

    `sigmas` may also ascend (from image to noise). `on_step` is called after every step and may raise to
    interrupt; `on_report` is called at the end. A stochastic solver draws from `noise`. The velocity receives
    sigma as a Python float, so that it is the same dictionary key on every device. Raises ValueError for
    fewer than two sigmas, for sigmas outside 0..1, and what the solver raises. Example:

        image = integrate(SOLVERS["heun"], velocity, noise, make_sigmas(20, seq_len=4096))
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
