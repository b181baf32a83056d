"""Velocities whose paths are known in closed form, in float64 and for several paths at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rectiflux.flux_core.model.spec import Velocity
from torch import Tensor


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class Problem:
    """A velocity and where its paths are at a sigma."""

    velocity: Velocity
    exact: Callable[[float], Tensor]

    def error(self, end: Tensor, sigma: float = 0.0) -> float:
        """Root mean square distance from the exact paths."""
        return float((end.double() - self.exact(sigma)).square().mean().sqrt())


CONSTANTS = doubles(1.5, 2.0, 3.0, -2.0, -1.2)
BENT = Problem(lambda x, s: x * x * math.cos(s), lambda s: 1 / (CONSTANTS - math.sin(s)))
"""dx/ds = x^2 cos(s): nonlinear, and solved by x(s) = 1 / (c - sin(s)), here for five c."""

SWINGING = Problem(
    lambda x, s: 12 * math.cos(12 * s) * x, lambda s: doubles(-2, 0.5, 1) * math.exp(math.sin(12 * s))
)
"""dx/ds = 12 cos(12 s) x: grows and falls twice, far too fast for 20 steps of equal length."""


def gaussian(mean: Tensor, deviation: Tensor) -> tuple[Velocity, Callable[[float], Tensor]]:
    """The exact velocity of data N(mean, deviation^2), and the variance at a sigma.

    Image and noise are independent, so x = (1 - s) image + s noise is N((1 - s) mean, var(s)) and
    E[noise - image | x] = -mean + (s - (1 - s) deviation^2) / var(s) (x - (1 - s) mean).
    """

    def variance(s: float) -> Tensor:
        return (1 - s) ** 2 * deviation**2 + s**2

    def velocity(x: Tensor, s: float) -> Tensor:
        slope = (s - (1 - s) * deviation**2) / variance(s)
        return -mean + slope * (x - (1 - s) * mean)

    return velocity, variance


def _flow() -> Problem:
    mean, deviation = torch.linspace(1, -1, 41).double(), torch.linspace(0.1, 1, 41).double()
    velocity, variance = gaussian(mean, deviation)
    start = torch.linspace(-2, 2, 41).double()
    return Problem(velocity, lambda s: (1 - s) * mean + variance(s).sqrt() * start)


FLOW = _flow()
"""The flow of 41 Gaussians, from narrow to as wide as the noise: x(s) = (1 - s) mean + sqrt(var(s)) z."""
