"""Losses on Gaussian data, where floor and minimizer are known: no sampling, Gauss quadrature instead.

The networks are linear in x there, so a loss is a quadratic polynomial of (x_0, noise), and three
Gauss-Hermite nodes a dimension integrate it exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy
import pytest
import torch
from rectiflux.flux_core.flow import (
    CosinePath,
    GaussianMixture,
    Network,
    Path,
    RectifiedPath,
    denoising_score_matching,
    flow_matching,
    noise_matching,
    rectified_flow,
)
from torch import Tensor

from .closed_form import PATHS

COVARIANCE = torch.tensor([[0.5, 0.3], [0.3, 1.2]], dtype=torch.float64)
DATA = GaussianMixture(torch.ones(1).double(), torch.tensor([[0.7, -0.4]]).double(), COVARIANCE[None])
LINE = GaussianMixture.isotropic(torch.tensor([[0.7]], dtype=torch.float64), 0.6)
Loss = Callable[[Network, Path, Tensor, Tensor, Tensor], Tensor]
LOSSES: dict[str, tuple[Loss, str]] = {
    "score matching": (denoising_score_matching, "score"),
    "noise matching": (noise_matching, "noise"),
    "flow matching": (flow_matching, "velocity"),
}
EVERY = pytest.mark.parametrize(
    ("path", "loss", "of"),
    [(path, loss, of) for path in PATHS.values() for loss, of in LOSSES.values()],
    ids=[f"{path}, {loss}" for path in PATHS for loss in LOSSES],
)


def nodes(data: GaussianMixture, count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """(x0 [n, D], noise [n, D], weights [n]): Gauss-Hermite over the Gaussian data and unit noise."""
    points, weights = (torch.from_numpy(a) for a in numpy.polynomial.hermite_e.hermegauss(count))
    dims = data.means.shape[1]
    grid = torch.cartesian_prod(*[points] * (2 * dims))
    shares = torch.cartesian_prod(*[weights / weights.sum()] * (2 * dims)).prod(1)
    root = torch.linalg.cholesky(data.covariances[0])
    return data.means[0] + grid[:, :dims] @ root.T, grid[:, dims:], shares


def expected(
    loss: Loss, network: Network, path: Path, data: GaussianMixture, t: float, count: int = 3
) -> Tensor:
    """The loss at t, averaged over data and noise."""
    x0, noise, weights = nodes(data, count)
    return weights @ loss(network, path, x0, noise, torch.full((len(x0),), t, dtype=torch.float64))


def average(loss: Loss, network: Network, path: Path, data: GaussianMixture) -> float:
    """The loss, averaged over t uniform in [0, 1] too, by 60 Gauss-Legendre nodes."""
    points, weights = numpy.polynomial.legendre.leggauss(60)
    return sum(
        w / 2 * expected(loss, network, path, data, (1 + p) / 2).item()
        for p, w in zip(points, weights, strict=True)
    )


@EVERY
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_floor_is_the_conditional_variance_of_the_target(
    path: Path, loss: Loss, of: str, t: float
) -> None:
    """Per element, from Gaussian conditioning with V = alpha^2 C + sigma^2 I:

    Var(noise | x_t) = alpha^2 C / V, and velocity and noise differ by the determinant (alpha sigma' - sigma
    alpha')/alpha given x_t.
    """
    time = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = path.alpha(time), path.sigma(time)
    total = alpha**2 * COVARIANCE + sigma**2 * torch.eye(2, dtype=torch.float64)
    floor = torch.linalg.solve(total, alpha**2 * COVARIANCE).trace() / 2
    if of == "velocity":
        floor = floor * ((alpha * path.sigma_rate(time) - sigma * path.alpha_rate(time)) / alpha) ** 2
    got = expected(loss, DATA.network(path, of), path, DATA, t)
    torch.testing.assert_close(got, floor, rtol=1e-10, atol=1e-12)


@EVERY
def test_any_perturbation_raises_the_loss_by_its_own_square(path: Path, loss: Loss, of: str) -> None:
    """L(v + d) = L(v) + E d^2 for every d(x, t): the exact prediction is the minimizer, and the only one."""
    exact, t = DATA.network(path, of), 0.4
    x0, noise, weights = nodes(DATA, 5)
    times = torch.full((len(x0),), t, dtype=torch.float64)
    scale = path.sigma(times[:1]).item() if of == "score" else 1.0
    for change in (lambda x: 0.1 + 0 * x, lambda x: -0.2 * x.flip(1), lambda x: 0.3 * x**2 - x):
        size = weights @ (scale * change(path.draw(x0, noise, times))).square().mean(1)
        changed = expected(loss, lambda x, t, d=change: exact(x, t) + d(x), path, DATA, t, 5)
        floor = expected(loss, exact, path, DATA, t, 5)
        torch.testing.assert_close(changed, floor + size, rtol=1e-10, atol=1e-12)
        assert changed > floor + 1e-3


def test_the_rectified_loss_ends_at_half_pi_times_the_std() -> None:
    """The integral over t of Var(noise - x0 | x_t) = s^2/((1 - t)^2 s^2 + t^2) is pi s/2 for std s, not 0.

    Put (1 - t) s tan(angle) = t. In more dimensions pi/2 times the mean of the covariance's roots.
    """

    def rectified(network: Network, path: Path, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return rectified_flow(network, x0, noise, t)

    path = RectifiedPath()
    for loss in (rectified, flow_matching):
        assert average(loss, LINE.network(path), path, LINE) == pytest.approx(math.pi * 0.6 / 2, rel=1e-10)
    roots = torch.linalg.eigvalsh(COVARIANCE).sqrt().mean().item()
    assert average(rectified, DATA.network(path), path, DATA) == pytest.approx(math.pi / 2 * roots, rel=1e-10)


def test_score_matching_is_ddpms_loss_in_other_letters() -> None:
    """A network for the noise, and the same one divided by -sigma as a score: the same loss, each sample."""
    path = CosinePath()
    x0, noise = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    score = denoising_score_matching(lambda x, t: -torch.sin(x) / path.sigma(t)[:, None], path, x0, noise, t)
    torch.testing.assert_close(score, noise_matching(lambda x, t: torch.sin(x), path, x0, noise, t))


def test_losses_are_one_value_per_sample_and_finite_where_they_can_be() -> None:
    x0, noise = torch.randn(2, 4, 3, 2, 5, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.0, 0.2, 0.7, 1.0])
    calls: list[tuple[Tensor, Tensor]] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        calls.append((x, t))
        return torch.zeros_like(x)

    loss = rectified_flow(network, x0, noise, t)
    torch.testing.assert_close(loss, (noise - x0).square().mean((1, 2, 3)))
    for path in PATHS.values():
        for matching in (denoising_score_matching, noise_matching):
            torch.testing.assert_close(matching(network, path, x0, noise, t), noise.square().mean((1, 2, 3)))
    for x, time in calls:
        assert x.shape == x0.shape and time is t
    with pytest.raises(ValueError, match="CosinePath has no finite velocity at t = 0"):
        flow_matching(network, CosinePath(), x0, noise, t)
    with pytest.raises(ValueError, match=r"\[2\]"):
        rectified_flow(network, x0, noise, t[:2])
