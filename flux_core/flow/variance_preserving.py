"""The paths of diffusion models, alpha^2 + sigma^2 = 1: in continuous time, and as DDPM's discrete chain.

Time is that of path.py: 0 is data, 1 is noise. alpha_bar is alpha^2, DDPM's cumulative product of
1 - beta_i (not to be confused with its alpha_i, one factor).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .path import Path


class VariancePreservingPath(Path):
    """alpha^2 + sigma^2 = 1: the law of dx = -beta(t)/2 x dt + sqrt(beta(t)) dw. Song et al. 2021, eq. 11.

    Given by log alpha_bar(t) = 2 log alpha(t) = -(integral of beta from 0 to t). sigma' is infinite at t = 0.
    """

    @abstractmethod
    def log_alpha_bar(self, t: Tensor) -> Tensor:
        """log alpha^2, from 0 downwards."""

    @abstractmethod
    def beta(self, t: Tensor) -> Tensor:
        """-d log alpha^2 / dt, at least 0."""

    @abstractmethod
    def _time_at_log(self, log_alpha_bar: Tensor) -> Tensor:
        """Inverse of `log_alpha_bar` on its own range."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self.log_alpha_bar(t) / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(self.log_alpha_bar(t)))

    def alpha_rate(self, t: Tensor) -> Tensor:
        return -self.beta(t) / 2 * self.alpha(t)

    def sigma_rate(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.alpha_rate(t) / self.sigma(t)

    def drift(self, t: Tensor) -> Tensor:
        """f(t) = -beta/2. Raises ValueError where beta is infinite."""
        return -self._finite_beta(t) / 2

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t) = sqrt(beta). Raises ValueError where beta is infinite."""
        return self._finite_beta(t).sqrt()

    def time_at(self, level: Tensor) -> Tensor:
        log_alpha_bar = -torch.log1p((level / (1 - level)) ** 2)
        last = self.log_alpha_bar(torch.ones_like(level))
        return self._time_at_log(torch.maximum(log_alpha_bar, last)).clamp(0, 1)

    def _finite_beta(self, t: Tensor) -> Tensor:
        beta = self.beta(t)
        if not bool(torch.isfinite(beta).all()):
            where = float(t[~torch.isfinite(beta)].flatten()[0])
            raise ValueError(f"{type(self).__name__} has no finite beta at t = {where:g}; keep t below 1")
        return beta


@dataclass(frozen=True)
class LinearBetaPath(VariancePreservingPath):
    """beta(t) = beta_min + t (beta_max - beta_min): DDPM's chain in continuous time.

    Song et al. 2021, appendix C. alpha(1) is exp(-(beta_min + beta_max)/4) = 0.0066, not 0: x_1 still
    contains that much data. Raises ValueError unless 0 < beta_min <= beta_max.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max < math.inf:
            raise ValueError(
                f"beta must rise from above 0, got beta_min {self.beta_min} and beta_max {self.beta_max}"
            )

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        return -t * (self.beta_min + t / 2 * (self.beta_max - self.beta_min))

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def _time_at_log(self, log_alpha_bar: Tensor) -> Tensor:
        root = torch.sqrt(self.beta_min**2 - 2 * (self.beta_max - self.beta_min) * log_alpha_bar)
        return -2 * log_alpha_bar / (self.beta_min + root)


@dataclass(frozen=True)
class CosinePath(VariancePreservingPath):
    """alpha_bar(t) = f(t)/f(0) with f(t) = cos^2((t + s)/(1 + s) pi/2). Nichol and Dhariwal 2021, eq. 17.

    arXiv:2102.09672. In continuous time, with nothing clipped: alpha(1) is exactly 0 and beta(1) infinite.
    `offset` is the paper's s. Raises ValueError unless 0 < offset.
    """

    offset: float = 0.008

    def __post_init__(self) -> None:
        if not 0 < self.offset < math.inf:
            raise ValueError(
                f"the offset of a cosine path must be above 0, got {self.offset}; 0.008 is usual"
            )

    @property
    def _rate(self) -> float:
        """Radians per unit of time."""
        return math.pi / 2 / (1 + self.offset)

    @property
    def _start(self) -> float:
        """f(0)^(1/2)."""
        return math.sin(self._rate)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(self._rate * (1 - t)) / self._start

    def sigma(self, t: Tensor) -> Tensor:
        """By sin^2 a - sin^2 b = sin(a - b) sin(a + b), which loses no digits near t = 0."""
        return (
            torch.sqrt(torch.sin(self._rate * t) * torch.sin(self._rate * (t + 2 * self.offset)))
            / self._start
        )

    def alpha_rate(self, t: Tensor) -> Tensor:
        return -self._rate * torch.cos(self._rate * (1 - t)) / self._start

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        return 2 * torch.log(self.alpha(t))

    def beta(self, t: Tensor) -> Tensor:
        return 2 * self._rate / torch.tan(self._rate * (1 - t))

    def _time_at_log(self, log_alpha_bar: Tensor) -> Tensor:
        return 1 - torch.asin(torch.exp(log_alpha_bar / 2) * self._start) / self._rate


@dataclass(frozen=True, eq=False)
class ChainPath(VariancePreservingPath):
    """The discrete chain of DDPM: x_i = sqrt(1 - beta_i) x_{i-1} + sqrt(beta_i) noise, i = 1..T, t = i/T.

    Ho et al. 2020 (arXiv:2006.11239), eq. 2. `betas` [T] in (0, 1) is kept in float64. Between the grid
    points it is the diffusion with the piecewise constant rate -T log(1 - beta_i), whose exact transitions
    are the chain's steps (not an approximation); at a grid point rates are those of the step that ends there.
    Raises ValueError for betas that are not a vector of values in (0, 1).
    """

    betas: Tensor

    def __post_init__(self) -> None:
        betas = torch.as_tensor(self.betas, dtype=torch.float64).detach().cpu()
        if betas.ndim != 1 or len(betas) < 1 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(f"betas must be a vector [T] of values between 0 and 1, got {self.betas}")
        object.__setattr__(self, "betas", betas)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.betas)

    @cached_property
    def alpha_bars(self) -> Tensor:
        """Products of (1 - beta_1) to (1 - beta_i), [T], float64: the square of alpha(i/T)."""
        return torch.exp(-self._integrals[1:])

    @cached_property
    def _integrals(self) -> Tensor:
        """-log alpha_bar at 0/T to T/T: [T + 1], float64, from 0."""
        return torch.cat([torch.zeros(1, dtype=torch.float64), -torch.log1p(-self.betas).cumsum(0)])

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        known, place, index = self._integrals.to(t.device), t.double() * self.steps, self._index(t)
        return -(known[index] + (place - index) * (known[index] - known[index - 1])).to(t.dtype)

    def beta(self, t: Tensor) -> Tensor:
        rates = -self.steps * torch.log1p(-self.betas)
        return rates.to(t.device)[self._index(t) - 1].to(t.dtype)

    def _index(self, t: Tensor) -> Tensor:
        """i of the step that t lies in, of the shape of t; 1e-4 lets a float32 i/T count as i/T."""
        return torch.ceil(t.detach().double() * self.steps - 1e-4).long().clamp(1, self.steps)

    def _time_at_log(self, log_alpha_bar: Tensor) -> Tensor:
        known, wanted = self._integrals.to(log_alpha_bar.device), -log_alpha_bar.double()
        index = torch.searchsorted(known, wanted.contiguous()).clamp(1, self.steps)
        share = (wanted - known[index - 1]) / (known[index] - known[index - 1])
        return ((index - 1 + share) / self.steps).to(log_alpha_bar.dtype)


def linear_betas(steps: int, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """Evenly spaced betas [steps], float64. Ho et al. 2020, section 4, whose 1000 steps go from 1e-4 to 0.02.

    For another number of steps scale first and last by 1000/steps to end with as much noise.
    Raises ValueError for fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"a chain needs at least 1 step, got {steps}; 1000 is usual")
    return torch.linspace(first, last, steps, dtype=torch.float64)


def cosine_betas(steps: int, offset: float = 0.008, largest: float = 0.999) -> Tensor:
    """Betas [steps], float64, of the cosine alpha_bar, none above `largest`. Nichol and Dhariwal 2021, 3.2.

    Raises ValueError for fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"a chain needs at least 1 step, got {steps}; 1000 is usual")
    alpha = CosinePath(offset).alpha(torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    return (1 - (alpha[1:] / alpha[:-1]) ** 2).clamp(max=largest)
