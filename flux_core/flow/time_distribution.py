"""Distributions of training times in (0, 1): uniform, logit-normal, mode, and any of them shifted by mu.

Esser et al. 2024 (arXiv:2403.03206), section 3.1; their t is ours, 0 at data. All draws lie strictly inside
(0, 1), at least the dtype's epsilon away from the ends, where scores and logits are infinite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..sampling.schedule import shift_sigmas


class TimeDistribution(Protocol):
    """A distribution of training times."""

    def sample(
        self, count: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Draws [count] in (0, 1), on the generator's device (the CPU without one)."""
        ...

    def density(self, t: Tensor) -> Tensor:
        """Probability density at t in (0, 1), of its shape; integrates to 1."""
        ...


@dataclass(frozen=True)
class UniformTime:
    """The uniform distribution."""

    def sample(
        self, count: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return _inside(_uniform(count, generator, dtype))

    def density(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class LogitNormalTime:
    """t = 1/(1 + e^-u), u ~ N(mean, std^2): the middle more than the ends. Esser et al. 2024, eq. 19.

    SD3 trains with mean 0 and std 1; a mean above 0 goes towards noise, and is the same as a shift by
    mu = mean. Raises ValueError unless 0 < std.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.std < math.inf:
            raise ValueError(f"the std of a logit-normal must be above 0, got {self.std}; 1 is usual")

    def sample(
        self, count: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        device = generator.device if generator else "cpu"
        normal = torch.randn(count, generator=generator, dtype=dtype, device=device)
        return _inside(torch.sigmoid(self.mean + self.std * normal))

    def density(self, t: Tensor) -> Tensor:
        z = (torch.logit(t) - self.mean) / self.std
        return torch.exp(-z.square() / 2) / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))


@dataclass(frozen=True)
class ModeTime:
    """t = f(u) = 1 - u - scale (cos^2(pi u/2) - 1 + u), u uniform. Esser et al. 2024, eq. 20.

    A positive scale favors the middle and a negative one the ends, whose density stays above 0, unlike the
    logit-normal's; 0 is uniform. Raises ValueError unless -1 <= scale <= 2/(pi - 2) = 1.75, beyond which f
    isn't monotone.
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise ValueError(
                f"the scale of mode times must lie between -1 and 2/(pi - 2), got {self.scale}; 1.29 is usual"
            )

    def _time(self, u: Tensor) -> Tensor:
        return 1 - u - self.scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)

    def sample(
        self, count: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return _inside(self._time(_uniform(count, generator, dtype)))

    def density(self, t: Tensor) -> Tensor:
        """1/|f'(u)| at f(u) = t, which is solved for by 60 bisections in float64."""
        wanted = t.double()
        low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
        for _ in range(60):
            middle = (low + high) / 2
            below = self._time(middle) > wanted  # f falls: u is further right
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        slope = 1 + self.scale * (1 - math.pi / 2 * torch.sin(math.pi * (low + high) / 2))
        return (1 / slope).to(t.dtype)


@dataclass(frozen=True)
class ShiftedTime:
    """Draws of `base`, shifted by mu as FLUX's sigmas are (schedule.shift_sigmas): towards noise if mu > 0.

    Esser et al. 2024, eq. 23, with their shift = e^mu. Raises ValueError unless -50 <= mu <= 50.
    """

    base: TimeDistribution
    mu: float

    def __post_init__(self) -> None:
        shift_sigmas(torch.ones(()), self.mu)

    def sample(
        self, count: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return _inside(shift_sigmas(self.base.sample(count, generator, dtype), self.mu))

    def density(self, t: Tensor) -> Tensor:
        """The base's at the time that was shifted to t, times d(that time)/dt."""
        slope = math.exp(self.mu) / (t + math.exp(self.mu) * (1 - t)) ** 2
        return self.base.density(shift_sigmas(t, -self.mu)) * slope


def _uniform(count: int, generator: torch.Generator | None, dtype: torch.dtype) -> Tensor:
    return torch.rand(
        count, generator=generator, dtype=dtype, device=generator.device if generator else "cpu"
    )


def _inside(t: Tensor) -> Tensor:
    epsilon = torch.finfo(t.dtype).eps
    return t.clamp(epsilon, 1 - epsilon)
