"""A mixture of Gaussians, for which every quantity of this package has a closed form: a reference for tests.

Along any path x_t = alpha x_0 + sigma noise a mixture stays a mixture: component k has mean alpha mu_k and
covariance C_k = alpha^2 Sigma_k + sigma^2 I, and with the responsibilities r_k(x) of the components for x_t

  score     -sum_k r_k C_k^-1 (x - alpha mu_k)
  data       sum_k r_k [mu_k + alpha Sigma_k C_k^-1 (x - alpha mu_k)]
  noise      sum_k r_k  sigma C_k^-1 (x - alpha mu_k)

(conditioning of Gaussians; Bishop 2006, section 2.3). Each of the four predictions has its own formula
here, so that they are an independent test of prediction.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .path import Path, RectifiedPath, Time, time_for
from .prediction import KINDS, Network


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Weights [M] that sum to 1, means [M, D] and covariances [M, D, D], all of one floating dtype.

    Raises ValueError for shapes that don't fit, weights that aren't a distribution, and covariances that
    aren't symmetric and positive definite.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor

    def __post_init__(self) -> None:
        m, d = self.means.shape if self.means.ndim == 2 else (-1, -1)
        if self.weights.shape != (m,) or self.covariances.shape != (m, d, d):
            raise ValueError(
                "a mixture needs weights [M], means [M, D] and covariances [M, D, D], got "
                f"{list(self.weights.shape)}, {list(self.means.shape)}, {list(self.covariances.shape)}"
            )
        if bool((self.weights < 0).any()) or abs(float(self.weights.sum()) - 1) > 1e-5:
            raise ValueError(f"weights must be at least 0 and sum to 1, got {self.weights.tolist()}")
        if not torch.equal(self.covariances, self.covariances.mT) or bool((self._axes[0] <= 0).any()):
            raise ValueError(
                "covariances must be symmetric and positive definite; give each as a square matrix"
            )

    @cached_property
    def _axes(self) -> tuple[Tensor, Tensor]:
        """Variances [M, D] along the principal axes, and the axes as columns [M, D, D].

        sigma^2 I adds to the variances and keeps the axes, so one decomposition is enough for every t.
        """
        variances, axes = torch.linalg.eigh(self.covariances)
        return variances, axes

    @classmethod
    def isotropic(cls, means: Tensor, std: float, weights: Tensor | None = None) -> GaussianMixture:
        """Components std^2 I about the means [M, D]; equal weights unless given. Raises as the class does."""
        m, d = means.shape
        if weights is None:
            weights = means.new_full((m,), 1 / m)
        return cls(
            weights, means, std**2 * torch.eye(d, dtype=means.dtype, device=means.device).repeat(m, 1, 1)
        )

    @classmethod
    def ring(cls, components: int = 8, radius: float = 2.0, std: float = 0.1) -> GaussianMixture:
        """Equal isotropic components evenly on a circle in the plane, the first at angle 0; float64."""
        angles = torch.arange(components, dtype=torch.float64) * (2 * math.pi / components)
        return cls.isotropic(radius * torch.stack([angles.cos(), angles.sin()], 1), std)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Independent draws [count, D]."""
        chosen = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        variances, axes = self._axes
        z = torch.randn(
            count, self.means.shape[1], generator=generator, dtype=self.means.dtype, device=self.means.device
        )
        return self.means[chosen] + torch.einsum("bij,bj->bi", axes[chosen], z * variances[chosen].sqrt())

    def mean(self) -> Tensor:
        """[D]."""
        return self.weights @ self.means

    def covariance(self) -> Tensor:
        """[D, D]: the components' own covariances and that of their means."""
        apart = self.means - self.mean()
        return torch.einsum(
            "m,mij->ij", self.weights, self.covariances + apart[:, :, None] * apart[:, None, :]
        )

    def marginal(self, path: Path, t: float) -> GaussianMixture:
        """The law of x_t on the path. Raises ValueError for t outside [0, 1]."""
        time = time_for(t, self.means)
        alpha, sigma = path.alpha(time).to(self.means.dtype), path.sigma(time).to(self.means.dtype)
        eye = torch.eye(self.means.shape[1], dtype=self.means.dtype, device=self.means.device)
        return GaussianMixture(self.weights, alpha * self.means, alpha**2 * self.covariances + sigma**2 * eye)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density in nats at x [B, D]: [B]."""
        variances, axes = self._axes
        return self._log_joint((x - self.means[:, None]) @ axes, variances[:, None]).logsumexp(0)

    def score(self, x: Tensor) -> Tensor:
        """grad log p at x [B, D]: [B, D]."""
        return self.predict(RectifiedPath(), "score", x, 0.0)

    def predict(self, path: Path, of: str, x: Tensor, t: Time) -> Tensor:
        """The exact prediction `of` (one of KINDS) at x [B, D] and t, a scalar or [B]: [B, D].

        Raises ValueError for another kind, a wrong t, and a velocity where the path has no finite rates.
        """
        if of not in KINDS:
            raise ValueError(f"a prediction must be one of {', '.join(KINDS)}, got {of!r}")
        time = time_for(t, x)
        alpha, sigma = path.alpha(time).to(x.dtype), path.sigma(time).to(x.dtype)  # [] or [B, 1]
        own, axes = self._axes
        variances = alpha**2 * own[:, None] + sigma**2  # of C_k: [M, 1 or B, D]
        along = (x - alpha * self.means[:, None]) @ axes  # coordinates along the axes: [M, B, D]
        shares = self._log_joint(along, variances).softmax(0)[..., None]
        solved = along / variances  # C_k^-1 (x - alpha mu_k), along the axes
        if of == "score":
            return -(shares * (solved @ axes.mT)).sum(0)
        noise = sigma * (shares * (solved @ axes.mT)).sum(0)
        if of == "noise":
            return noise
        data = (shares * (self.means[:, None] + alpha * (own[:, None] * solved @ axes.mT))).sum(0)
        if of == "data":
            return data
        alpha_rate, sigma_rate = path.rates(time)
        return alpha_rate.to(x.dtype) * data + sigma_rate.to(x.dtype) * noise

    def network(self, path: Path, of: str = "velocity") -> Network:
        """The network (x, t) -> prediction that minimizes the loss of `of` on this path."""
        return lambda x, t: self.predict(path, of, x, t)

    def _log_joint(self, along: Tensor, variances: Tensor) -> Tensor:
        """log(weight_k N(x; m_k, C_k)) from x - m_k along the axes, [M, B, D]: [M, B]."""
        terms = along.square() / variances + variances.log() + math.log(2 * math.pi)
        return self.weights.log()[:, None] - terms.sum(-1) / 2
