"""The mixture against torch.distributions, autograd and Bayes' integral by quadrature."""

from __future__ import annotations

import math

import pytest
import torch
from rectiflux.flux_core.flow import GaussianMixture, Path, RectifiedPath
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from .closed_form import ALL, MIXTURE


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


POINTS = 2 * torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def reference(mixture: GaussianMixture) -> MixtureSameFamily:
    return MixtureSameFamily(
        Categorical(mixture.weights), MultivariateNormal(mixture.means, mixture.covariances)
    )


def test_density_mean_and_covariance_are_those_of_torch_distributions() -> None:
    torch.testing.assert_close(
        MIXTURE.log_prob(POINTS), reference(MIXTURE).log_prob(POINTS), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(MIXTURE.mean(), reference(MIXTURE).mean)
    torch.testing.assert_close(MIXTURE.covariance().diagonal(), reference(MIXTURE).variance)


@ALL
def test_the_marginal_is_the_law_of_the_drawn_points(path: Path) -> None:
    """At t: means alpha mu, covariances alpha^2 Sigma + sigma^2 I; at 0 the mixture itself."""
    t = tensor(0.4)
    alpha, sigma = path.alpha(t), path.sigma(t)
    expected = reference(
        GaussianMixture(
            MIXTURE.weights,
            alpha * MIXTURE.means,
            alpha**2 * MIXTURE.covariances + sigma**2 * torch.eye(2, dtype=torch.float64),
        )
    )
    got = MIXTURE.marginal(path, 0.4).log_prob(POINTS)
    torch.testing.assert_close(got, expected.log_prob(POINTS), rtol=1e-12, atol=1e-12)
    at_zero = MIXTURE.marginal(path, 0.0).log_prob(POINTS)
    torch.testing.assert_close(at_zero, MIXTURE.log_prob(POINTS), rtol=1e-12, atol=1e-12)


@ALL
@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_predictions_are_bayes_integrals(path: Path, t: float) -> None:
    """E[f(x_0) | x_t] in one dimension by the trapezoid rule over x_0, which converges geometrically here."""
    mixture = GaussianMixture.isotropic(tensor([[-1.0], [0.5], [2.0]]), 0.3, tensor([0.2, 0.5, 0.3]))
    alpha, sigma = path.alpha(tensor(t)), path.sigma(tensor(t))
    x = tensor([-1.2, 0.0, 0.7, 1.9])[:, None]
    x0 = torch.linspace(-6, 8, 20001, dtype=torch.float64)
    log_joint = mixture.log_prob(x0[:, None]) - ((x - alpha * x0) / sigma) ** 2 / 2
    shares = log_joint.softmax(1)
    noise = (x - alpha * x0) / sigma
    rates = path.alpha_rate(tensor(t)), path.sigma_rate(tensor(t))
    expected = {
        "data": shares @ x0,
        "noise": (shares * noise).sum(1),
        "velocity": (shares * (rates[0] * x0 + rates[1] * noise)).sum(1),
        "score": -(shares * noise).sum(1) / sigma,
    }
    for of, value in expected.items():
        torch.testing.assert_close(mixture.predict(path, of, x, t)[:, 0], value, rtol=1e-10, atol=1e-10)


OWN = tensor([[1.0, 0.5, -0.3], [0.5, 0.8, 0.2], [-0.3, 0.2, 0.4]])


def in_space(apart: float) -> GaussianMixture:
    """In two dimensions the principal axes may be their own transpose, and a mistake hide; not here."""
    means = tensor([[apart / 2, 0.0, 0.0], [-apart / 2, 0.0, 0.0]])
    return GaussianMixture(tensor([0.3, 0.7]), means, torch.stack([OWN, OWN.flip(0, 1)]))


@ALL
def test_score_and_data_in_three_dimensions(path: Path) -> None:
    """The score by autograd of torch.distributions' density of x_t, the data by Tweedie's formula."""
    mixture, t = in_space(2.0), tensor(0.4)
    alpha, sigma = path.alpha(t), path.sigma(t)
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    (score,) = torch.autograd.grad(reference(mixture.marginal(path, 0.4)).log_prob(x).sum(), x)
    x = x.detach()
    torch.testing.assert_close(mixture.predict(path, "score", x, 0.4), score, rtol=1e-11, atol=1e-11)
    data = (x + sigma**2 * score) / alpha
    torch.testing.assert_close(mixture.predict(path, "data", x, 0.4), data, rtol=1e-11, atol=1e-11)


def test_samples_follow_each_component() -> None:
    """One component far from the other: its draws alone have its weight and covariance."""
    mixture = in_space(200.0)
    x = mixture.sample(30_000, torch.Generator().manual_seed(4))
    near = x[x[:, 0] > 0] - mixture.means[0]
    assert len(near) / len(x) == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / len(x)))
    products = near[:, :, None] * near[:, None, :]
    assert torch.all((products.mean(0) - OWN).abs() < 4 * products.std(0) / math.sqrt(len(near)))


def test_the_ring_is_a_ring() -> None:
    ring = GaussianMixture.ring(8, radius=2.0, std=0.1)
    torch.testing.assert_close(ring.means.norm(dim=1), torch.full((8,), 2.0).double())
    torch.testing.assert_close(ring.means[2], tensor([0.0, 2.0]))
    torch.testing.assert_close(ring.covariance(), (2.0**2 / 2 + 0.01) * torch.eye(2).double())


def test_wrong_mixtures_are_refused() -> None:
    mean, eye = torch.zeros(1, 2), torch.eye(2)[None]
    for weights, means, match in (
        (torch.ones(2) / 2, mean, r"\[2\], \[1, 2\], \[1, 2, 2\]"),
        (torch.ones(1), mean[0], r"\[1\], \[2\], \[1, 2, 2\]"),
        (torch.ones(1) / 2, mean, r"\[0.5\]"),
    ):
        with pytest.raises(ValueError, match=match):
            GaussianMixture(weights, means, eye)
    for covariance in ([[1.0, 0.5], [0.0, 1.0]], [[1.0, 2.0], [2.0, 1.0]]):
        with pytest.raises(ValueError, match="positive definite"):
            GaussianMixture(torch.ones(1), mean, torch.tensor([covariance]))
    with pytest.raises(ValueError, match="epsilon"):
        MIXTURE.predict(RectifiedPath(), "epsilon", POINTS, 0.5)
