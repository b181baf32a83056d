"""Likelihoods along the ODE against the mixture's own, and Hutchinson's estimate against the exact trace."""

from __future__ import annotations

import math

import pytest
import torch
from rectiflux.flux_core.flow import (
    CosinePath,
    GaussianMixture,
    LinearBetaPath,
    Path,
    RectifiedPath,
    as_velocity,
    bits_per_element,
    draw_probes,
    exact_divergence,
    hutchinson_divergence,
    log_likelihood,
    log_unit_gaussian,
)
from rectiflux.flux_core.sampling.solver import SOLVERS
from torch import Tensor

from .closed_form import MIXTURE

POINTS = MIXTURE.sample(40, torch.Generator().manual_seed(0))
RECTIFIED = as_velocity(RectifiedPath(), MIXTURE.network(RectifiedPath()))
KINDS = pytest.mark.parametrize("kind", ["rademacher", "gaussian"])


def evenly(start: float, end: float, steps: int) -> Tensor:
    return torch.linspace(start, end, steps + 1, dtype=torch.float64)


def test_the_exact_likelihood_is_the_mixtures() -> None:
    """Data, and points where there are hardly any; RK4 over 150 steps agrees to 1e-5 nats."""
    x = torch.cat([POINTS, torch.tensor([[3.0, 3.0], [0.0, 0.0], [-2.0, 2.0]], dtype=torch.float64)])
    got = log_likelihood(RECTIFIED, x, evenly(0, 1, 150))
    torch.testing.assert_close(got, MIXTURE.log_prob(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", [LinearBetaPath(), CosinePath()], ids=["linear", "cosine"])
def test_a_part_of_a_diffusion_from_one_marginal_to_another(path: Path) -> None:
    """From t = 0.1, since velocities are infinite at 0, to 0.8, with the marginal there for the prior."""
    velocity = as_velocity(path, MIXTURE.network(path, "score"), "score")
    prior = MIXTURE.marginal(path, 0.8).log_prob
    got = log_likelihood(velocity, POINTS, evenly(0.1, 0.8, 150), log_prior=prior)
    torch.testing.assert_close(got, MIXTURE.marginal(path, 0.1).log_prob(POINTS), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "order"), [("heun", 2), ("rk4", 4)])
def test_the_error_is_of_the_solvers_order(name: str, order: int) -> None:
    """On Gaussian data of std 2, at x = 1, against log N(1; 0, 4) = -1/8 - log(2 sqrt(2 pi))."""
    line = GaussianMixture.isotropic(torch.zeros(1, 1, dtype=torch.float64), 2.0)
    velocity = as_velocity(RectifiedPath(), line.network(RectifiedPath()))
    x, exact = torch.ones(1, 1, dtype=torch.float64), -1 / 8 - math.log(2 * math.sqrt(2 * math.pi))
    errors = [
        abs(log_likelihood(velocity, x, evenly(0, 1, steps), solver=SOLVERS[name]).item() - exact)
        for steps in (64, 128)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_the_divergence_of_a_known_field() -> None:
    """v = (x y, sin y + t, x z^2): div v = y + cos y + 2 x z; samples stay apart."""
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def field(x: Tensor, t: float) -> Tensor:
        return torch.stack([x[:, 0] * x[:, 1], torch.sin(x[:, 1]) + t, x[:, 0] * x[:, 2] ** 2], 1)

    v, div = exact_divergence(field, x, 0.3)
    assert torch.equal(v, field(x, 0.3))
    torch.testing.assert_close(div, x[:, 1] + torch.cos(x[:, 1]) + 2 * x[:, 0] * x[:, 2])


def test_rademacher_probes_are_exact_for_a_diagonal_jacobian() -> None:
    """e_i^2 = 1: no variance at all; Gaussian probes have some."""
    x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probes = draw_probes(x, 1, "rademacher", torch.Generator().manual_seed(1))
    v, div = hutchinson_divergence(lambda x, t: x**3, x, 0.0, probes)
    torch.testing.assert_close(div, (3 * x**2).sum((1, 2)), rtol=1e-12, atol=1e-12)
    assert torch.equal(v, x**3)
    gaussian = draw_probes(x, 1, "gaussian", torch.Generator().manual_seed(1))
    assert not torch.allclose(hutchinson_divergence(lambda x, t: x**3, x, 0.0, gaussian)[1], div, rtol=0.01)


@KINDS
def test_hutchinsons_likelihood_is_unbiased(kind: str) -> None:
    """1000 integrations of one point, each with its own two probes, against the mixture's own log p."""
    x = torch.tensor([[0.4, -0.3]], dtype=torch.float64)
    many = x.repeat(1000, 1)
    probes = draw_probes(many, 2, kind, torch.Generator().manual_seed(0))
    got = log_likelihood(RECTIFIED, many, evenly(0, 1, 40), probes=probes)
    assert got.std() > 0.05
    assert abs(got.mean() - MIXTURE.log_prob(x)) < 4 * got.std() / math.sqrt(1000)


def test_probes_have_unit_variance() -> None:
    x = torch.zeros(500, 4)
    rademacher = draw_probes(x, 10, "rademacher", torch.Generator().manual_seed(0))
    assert rademacher.shape == (10, 500, 4) and torch.equal(rademacher.abs(), torch.ones(10, 500, 4))
    assert abs(rademacher.mean().item()) < 4 / math.sqrt(20_000)
    gaussian = draw_probes(x, 10, "gaussian", torch.Generator().manual_seed(0))
    assert abs(gaussian.square().mean().item() - 1) < 4 * math.sqrt(2 / 20_000)
    assert draw_probes(x.double(), 1).dtype == torch.float64


def test_a_flow_that_moves_without_squeezing_keeps_the_density() -> None:
    """v constant, so div v = 0: log p(x) = log N(x + v). Images too, in float32, without gradients left."""
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    shift = torch.full((), 0.5, requires_grad=True)
    got = log_likelihood(lambda x, sigma: shift.expand(x.shape), x, [0.0, 0.5, 1.0])
    torch.testing.assert_close(got, log_unit_gaussian(x + 0.5))
    still = log_likelihood(lambda x, sigma: torch.zeros_like(x), x, [0.0, 1.0], probes=draw_probes(x, 1))
    torch.testing.assert_close(still, log_unit_gaussian(x))
    assert got.dtype == torch.float32 and not got.requires_grad


def test_nats_and_bits() -> None:
    """log N(0; 0, I) of 12 elements is -6 log(2 pi) nats; a density of 2^-6 over 3 elements is 2 bits."""
    assert log_unit_gaussian(torch.zeros(1, 3, 2, 2)).item() == pytest.approx(
        -6 * math.log(2 * math.pi), rel=1e-6
    )
    assert bits_per_element(torch.tensor([-6 * math.log(2)]), 3).item() == pytest.approx(2, rel=1e-6)


def test_wrong_input_is_refused() -> None:
    x = torch.zeros(2, 3)
    for sigmas in ([1.0, 0.0], [0.0, 0.5, 0.5]):
        with pytest.raises(ValueError, match="ascend"):
            log_likelihood(lambda x, sigma: x, x, sigmas)
    for wrong in (torch.zeros(2), torch.zeros(0, 3)):
        with pytest.raises(ValueError, match=rf"got shape \{list(wrong.shape)}"):
            log_likelihood(lambda x, sigma: x, wrong, [0.0, 1.0])
    with pytest.raises(ValueError, match="1 probe, got 0"):
        draw_probes(x, 0)
    with pytest.raises(ValueError, match="uniform"):
        draw_probes(x, 1, "uniform")
    with pytest.raises(ValueError, match=r"got \[2, 3\] for x \[2, 3\]"):
        log_likelihood(lambda x, sigma: x, x, [0.0, 1.0], probes=x)
