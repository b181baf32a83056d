"""Straightness and transport cost of a flow's paths.

Along the model's own ODE from noise X_1 to data X_0, in time as FLUX counts it (0 data, 1 noise):

  straightness    S = integral over t of E |(X_1 - X_0) - v(X_t, t)|^2     (0: one Euler step is exact)
  transport cost  E |X_1 - X_0|^2

Liu et al. 2022 (arXiv:2209.03003, section 3). Both are sums over the elements of a sample
and means over samples; divide by the number of elements to compare samples of different sizes. S is a sum
over steps, each with the velocity at its start, and depends on how many there are (one step is always
straight): compare only values for the same number of steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.spec import Velocity
from ..sampling.solver import SOLVERS, Solver, Step, integrate


class PathRecorder:
    """An `on_step` callback of `integrate` that measures a path's straightness without evaluations."""

    def __init__(self) -> None:
        self.sigmas: list[float] = []
        self.starts: list[Tensor] = []
        self.velocities: list[Tensor] = []

    def __call__(self, step: Step) -> None:
        """Record a step's start. Raises ValueError for one that begins at sigma 0, on the way to noise."""
        if step.sigma <= 0:
            raise ValueError("straightness is measured from noise to data, got a step that begins at sigma 0")
        self.sigmas.append(step.sigma)
        if not self.starts:
            self.starts.append(step.x)
        self.velocities.append((step.x - step.denoised) / step.sigma)

    def straightness(self, end: Tensor, sigma_end: float = 0.0) -> Tensor:
        """S of each sample [B], float64, for a path that came to `end` [B, ...] at sigma_end.

        For a path that begins at sigma s and ends at e the chord X_1 - X_0 is (X_s - X_e) / (s - e), and S is
        the mean over [e, s], so that values for parts of a path are comparable. Raises ValueError
        before the first step.
        """
        if not self.sigmas:
            raise ValueError("there is no path yet: give the recorder to integrate as on_step first")
        length = self.sigmas[0] - sigma_end
        chord = (self.starts[0].double() - end.double()) / length
        total = torch.zeros(len(end), dtype=torch.float64, device=end.device)
        for sigma, after, v in zip(self.sigmas, [*self.sigmas[1:], sigma_end], self.velocities, strict=True):
            deviation = (chord - v.double()).flatten(1).square().sum(1)
            total += (sigma - after) / length * deviation
        return total


def straightness(
    velocity: Velocity, noise: Tensor, steps: int, solver: Solver = SOLVERS["euler"], chunk: int = 4096
) -> float:
    """S of the flow over `steps` equal steps from sigma 1 to 0, estimated on noise [B, ...]; not negative.

    `chunk` rows are integrated at a time, without gradients. Raises ValueError for fewer than two steps, over
    which S is always 0.
    """
    if steps < 2:
        raise ValueError(f"straightness needs at least two steps (one is always straight), got {steps}")
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    parts: list[Tensor] = []
    with torch.no_grad():
        for part in noise.split(chunk):
            recorder = PathRecorder()
            end = integrate(solver, velocity, part, sigmas, recorder)
            parts.append(recorder.straightness(end))
    return torch.cat(parts).mean().item()


def transport_cost(x0: Tensor, noise: Tensor) -> float:
    """E |noise - x0|^2 of the pairs [B, ...]. Raises ValueError for different shapes."""
    if x0.shape != noise.shape:
        raise ValueError(
            f"transport cost is that of pairs of one shape, got {list(x0.shape)} and {list(noise.shape)}"
        )
    return (noise.double() - x0.double()).flatten(1).square().sum(1).mean().item()
