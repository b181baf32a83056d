"""Euler with added noise: the right distribution at every noise amount, the same for the same seed."""

from __future__ import annotations

import math

import pytest
import torch
from rectiflux.flux_core.pipeline import draw_noise
from rectiflux.flux_core.sampling.schedule import make_sigmas
from rectiflux.flux_core.sampling.solver import SOLVERS, EulerAncestral, integrate, seeded_noise
from rectiflux.flux_core.sampling.solver.stochastic import ancestral_coefficients
from torch import Tensor

from .problems import BENT, doubles, gaussian

ETAS = pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])


@pytest.mark.parametrize("eta", [0.01, 0.5, 1.0])
def test_a_step_down_and_back_keeps_image_and_noise_in_proportion(eta: float) -> None:
    """a (1 - down) = 1 - next, and the variances of old and new noise add up to next^2."""
    sigmas = [1.0, 0.95, 0.5, 0.1, 0.003]
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        down, a, b = ancestral_coefficients(sigma, sigma_next, eta)
        assert 0 <= down < sigma_next and b > 0
        assert a * (1 - down) == pytest.approx(1 - sigma_next, rel=1e-14)
        assert (a * down) ** 2 + b**2 == pytest.approx(sigma_next**2, rel=1e-14)


def test_short_steps_are_those_of_the_sde() -> None:
    """The noise of a step of length h has variance g^2 h, g^2 = 2 eta sigma / (1 - sigma)."""
    h = 1e-6
    for sigma, eta in ((0.9, 1.0), (0.5, 0.3), (0.1, 0.7)):
        _, _, b = ancestral_coefficients(sigma + h, sigma, eta)
        assert b**2 / h == pytest.approx(2 * eta * sigma / (1 - sigma), rel=1e-4)


def moments(eta: float, sigmas: Tensor, mean: float, deviation: float) -> tuple[float, float]:
    """Mean and variance of the end over all noise, exactly: the velocity of a Gaussian is affine in x.

    Entry 0 of x is the noise-free path from mean 0; entry 1 starts from the initial noise's deviation,
    entry k + 1 from the noise of step k, both without the affine part, so that their squares add up.
    """
    velocity, _ = gaussian(doubles(mean), doubles(deviation))
    count = len(sigmas) + 1

    def parts(x: Tensor, sigma: float) -> Tensor:
        affine = velocity(torch.zeros_like(x), sigma)
        return velocity(x, sigma) - torch.cat([torch.zeros(1).double(), affine[1:]])

    drawn = iter(range(2, count))

    def one_at_a_time(x: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(next(drawn)), count).double()

    start = torch.zeros(count).double()
    start[1] = float(sigmas[0])
    end = integrate(EulerAncestral(eta=eta), parts, start, sigmas, noise=one_at_a_time)
    return float(end[0]), float(end[1:].square().sum())


@ETAS
def test_mean_and_variance_are_reached_at_order_1(eta: float) -> None:
    """From sigma 1 to 0, to a Gaussian of mean 0.7 and deviation 0.4, without sampling error."""
    errors = []
    for steps in (500, 1000):
        mean, variance = moments(eta, torch.linspace(1, 0, steps + 1).double(), 0.7, 0.4)
        errors.append((abs(mean - 0.7), abs(variance - 0.16)))
    for coarse, fine in zip(*errors, strict=True):
        assert fine < 1e-12 or math.log2(coarse / fine) == pytest.approx(1, abs=0.1)
    assert errors[-1][1] < 2e-3


@pytest.mark.parametrize("eta", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("end", [0.0, 0.4])
def test_samples_have_the_marginal_of_the_path(eta: float, end: float) -> None:
    """Mean and variance of 40,000 samples at the last sigma within 4 standard errors of the path's."""
    mean, deviation, count, steps = 0.7, 0.4, 40_000, 1000
    velocity, variance = gaussian(doubles(mean), doubles(deviation))
    sigmas = torch.linspace(1, end, steps + 1).double()
    start = torch.randn(count, generator=torch.Generator().manual_seed(1)).double()
    x = integrate(EulerAncestral(eta=eta), velocity, start, sigmas, noise=seeded_noise(2))
    expected = float(variance(end))
    assert abs(float(x.mean()) - (1 - end) * mean) < 4 * math.sqrt(expected / count)
    assert abs(float(x.var()) - expected) < 4 * expected * math.sqrt(2 / count)


def test_noise_makes_the_end_independent_of_the_start() -> None:
    """With eta 1 the end is almost uncorrelated with the start; with 0 it is a function of it."""
    velocity, _ = gaussian(doubles(0.7), doubles(0.4))
    start = torch.randn(10_000, generator=torch.Generator().manual_seed(1)).double()
    correlation = {}
    for eta in (0.0, 0.3, 1.0):
        sigmas = torch.linspace(1, 0, 101).double()
        end = integrate(EulerAncestral(eta=eta), velocity, start, sigmas, noise=seeded_noise(2))
        correlation[eta] = float(torch.corrcoef(torch.stack([start, end]))[0, 1])
    assert correlation[0.0] == pytest.approx(1)
    assert correlation[0.0] > correlation[0.3] + 0.1 > correlation[1.0] + 0.2
    assert abs(correlation[1.0]) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_noise_it_is_euler_bit_for_bit(dtype: torch.dtype) -> None:
    for steps in (1, 7):
        sigmas = make_sigmas(steps, 1024)
        start = BENT.exact(1.0).to(dtype)
        plain, without = (
            integrate(solver, BENT.velocity, start, sigmas)
            for solver in (SOLVERS["euler"], EulerAncestral(eta=0.0))
        )
        assert torch.equal(plain, without)


def test_a_seed_gives_the_same_end_and_another_seed_another() -> None:
    sigmas = make_sigmas(5, 256)
    start = draw_noise(4, 1, 4, 4)
    first, again, other = (
        integrate(SOLVERS["euler_ancestral"], lambda x, s: torch.sin(x), start, sigmas, noise=seeded_noise(n))
        for n in (4, 4, 5)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_noise_is_that_of_comfyui_on_a_cpu() -> None:
    """A generator started at seed + 1, one draw a step; the global generator is not used."""
    x = torch.zeros(2, 3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(43)
    expected = [torch.randn(2, 3, generator=generator) for _ in range(2)]
    torch.manual_seed(5)
    after = torch.randn(1)
    torch.manual_seed(5)
    draw = seeded_noise(42)
    drawn = [draw(x), draw(x)]
    assert drawn[0].dtype == torch.float64
    assert all(torch.equal(a, b.double()) for a, b in zip(drawn, expected, strict=True))
    assert torch.equal(torch.randn(1), after)
    assert torch.isfinite(seeded_noise(2**64 - 1)(x)).all()


def test_the_last_step_adds_no_noise() -> None:
    """A single step onto sigma 0 draws nothing; steps to a sigma above it all do."""
    draws = []

    def noise(x: Tensor) -> Tensor:
        draws.append(1)
        return torch.zeros_like(x)

    for sigmas, expected in (([1.0, 0.0], 0), ([1.0, 0.5, 0.0], 1), ([1.0, 0.5, 0.2], 2)):
        draws.clear()
        integrate(SOLVERS["euler_ancestral"], BENT.velocity, BENT.exact(1.0), sigmas, noise=noise)
        assert len(draws) == expected


def test_wrong_use_is_refused() -> None:
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"between 0 and 1, got {eta}"):
            EulerAncestral(eta=eta)
    with pytest.raises(ValueError, match="seeded_noise"):
        integrate(SOLVERS["euler_ancestral"], BENT.velocity, BENT.exact(1.0), [1.0, 0.0])
    with pytest.raises(ValueError, match="ascend from 0.5 to 0.75"):
        integrate(
            SOLVERS["euler_ancestral"], BENT.velocity, BENT.exact(0.5), [0.5, 0.75], noise=torch.randn_like
        )
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=f"seed .* got {seed}"):
            seeded_noise(seed)
