"""Paths from data to noise, x_t = alpha(t) x_0 + sigma(t) noise, behind one interface.

Time runs as in FLUX: t = 0 is data, t = 1 is noise (facebookresearch/flow_matching and Lipman et al. 2023
count the other way). On the rectified path t is FLUX's sigma itself. A time is a scalar or one value per
sample, [B], for x [B, ...] of any trailing shape.

A Gaussian path is also the marginal law of the linear SDE dx = f(t) x dt + g(t) dw (Song et al. 2021,
arXiv:2011.13456, appendix B) with f = alpha'/alpha and g^2 = (sigma^2)' - 2 f sigma^2, so that
diffusions and flows are the same family. The diffusions' paths are in variance_preserving.py, the predictions
of networks along a path in prediction.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

Time = float | Tensor
"""A time in [0, 1]: a scalar for the whole batch, or a tensor [B], one per sample."""


def time_for(t: Time, x: Tensor) -> Tensor:
    """t as a tensor that broadcasts against x: 0-dimensional float64, or [B, 1, ..., 1] in its own dtype.

    Raises ValueError for a time outside 0..1 and for a tensor that is neither a scalar nor [B].
    """
    if not isinstance(t, Tensor):
        t = torch.tensor(float(t), dtype=torch.float64)
    if t.ndim > 1 or (t.ndim == 1 and (x.ndim == 0 or len(t) != len(x))):
        raise ValueError(
            f"t must be a scalar or [B], one per sample, got shape {list(t.shape)} for x {list(x.shape)}"
        )
    inside = (t >= 0) & (t <= 1)
    if not bool(inside.all()):
        raise ValueError(f"t must lie between 0 (data) and 1 (noise), got {float(t[~inside].flatten()[0])}")
    return t if t.ndim == 0 else t.reshape(-1, *[1] * (x.ndim - 1))


class Path(ABC):
    """A path from data to noise: alpha falls from 1 towards 0, sigma rises from 0 towards 1, both in [0, 1].

    The four schedule methods take a tensor of times in [0, 1] and return one of its shape and dtype.
    """

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Share of the data in x_t, strictly decreasing from 1."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Share (standard deviation) of the noise in x_t, strictly increasing from 0."""

    @abstractmethod
    def alpha_rate(self, t: Tensor) -> Tensor:
        """d alpha / dt, at most 0."""

    @abstractmethod
    def sigma_rate(self, t: Tensor) -> Tensor:
        """d sigma / dt, at least 0; may be infinite at t = 0."""

    @abstractmethod
    def time_at(self, level: Tensor) -> Tensor:
        """The t at which `level(t)` is `level`; 1 for levels that the path does not reach."""

    def level(self, t: Tensor) -> Tensor:
        """sigma / (alpha + sigma) in [0, 1]: the time at which the rectified path is equally noisy."""
        sigma = self.sigma(t)
        return sigma / (self.alpha(t) + sigma)

    def draw(self, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """x_t = alpha x_0 + sigma noise, of the shape and dtype of x0. Raises ValueError for a wrong t."""
        time = time_for(t, x0)
        return self.alpha(time).to(x0.dtype) * x0 + self.sigma(time).to(x0.dtype) * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """dx_t/dt = alpha' x_0 + sigma' noise at fixed x_0 and noise, of the shape and dtype of x0.

        Raises ValueError for a wrong t and where sigma' is infinite (a diffusion at t = 0).
        """
        alpha_rate, sigma_rate = self.rates(time_for(t, x0))
        return alpha_rate.to(x0.dtype) * x0 + sigma_rate.to(x0.dtype) * noise

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha', sigma'), both finite. Raises ValueError where they are not."""
        alpha_rate, sigma_rate = self.alpha_rate(t), self.sigma_rate(t)
        infinite = ~(torch.isfinite(alpha_rate) & torch.isfinite(sigma_rate))
        if bool(infinite.any()):
            where = float(t[infinite].flatten()[0])
            raise ValueError(
                f"{type(self).__name__} has no finite velocity at t = {where:g}; keep t inside (0, 1)"
            )
        return alpha_rate, sigma_rate

    def drift(self, t: Tensor) -> Tensor:
        """f(t) = alpha'/alpha of the path's own SDE. Raises ValueError where it is infinite."""
        alpha = self.alpha(t)
        if bool((alpha == 0).any()):
            where = float(t[alpha == 0].flatten()[0])
            raise ValueError(f"{type(self).__name__} has no finite drift at t = {where:g}, where alpha is 0")
        return self.rates(t)[0] / alpha

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t) >= 0 of the path's own SDE, g^2 = 2 sigma (sigma' - f sigma). Raises what `drift` raises."""
        sigma = self.sigma(t)
        return (2 * sigma * (self.rates(t)[1] - self.drift(t) * sigma)).clamp(min=0).sqrt()


@dataclass(frozen=True)
class RectifiedPath(Path):
    """x_t = (1 - t) x_0 + t noise, FLUX's path; its velocity is noise - x_0 at every t.

    Liu et al. 2023 (arXiv:2209.03003), eq. 1, with time reversed. Its own SDE has f = -1/(1 - t) and
    g^2 = 2t/(1 - t), both infinite at t = 1: sample it by its ODE, or by an SDE with another g
    (diffusion.py). The lines are straight for each pair; the marginal flow is not, unless the pairs'
    lines don't cross (straightness.py).
    """

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def alpha_rate(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def sigma_rate(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time_at(self, level: Tensor) -> Tensor:
        return level
