"""DDPM's chain and the SDEs, on Gaussians where each step's mean and variance are known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from rectiflux.flux_core.flow import (
    ChainPath,
    CosinePath,
    GaussianMixture,
    LinearBetaPath,
    Path,
    RectifiedPath,
    ancestral_step,
    as_velocity,
    cosine_betas,
    forward_step,
    linear_betas,
    sample_ancestral,
    sample_sde,
)
from rectiflux.flux_core.sampling.solver import SOLVERS, integrate
from torch import Tensor

ZERO, ONE = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
CHAINS = pytest.mark.parametrize(
    "chain", [ChainPath(linear_betas(1000)), ChainPath(cosine_betas(200))], ids=["linear", "cosine"]
)
STD = 0.6
GAUSSIAN = GaussianMixture.isotropic(torch.zeros(1, 1, dtype=torch.float64), STD)


@CHAINS
def test_the_forward_chain_has_the_mean_and_variance_of_its_closed_form(chain: ChainPath) -> None:
    """Both carried through the steps themselves: what a step makes of 1 without noise, of 0 with noise 1."""
    mean, variance = 1.0, 0.0
    for step in range(1, chain.steps + 1):
        gain = forward_step(chain, ONE, step, ZERO).item()
        mean, variance = gain * mean, gain**2 * variance + forward_step(chain, ZERO, step, ONE).item() ** 2
        t = torch.tensor(step / chain.steps, dtype=torch.float64)
        assert mean == pytest.approx(chain.alpha(t).item(), abs=1e-12)
        assert variance == pytest.approx(chain.sigma(t).item() ** 2, abs=1e-12)


@CHAINS
def test_the_ancestral_mean_is_the_posterior_mean(chain: ChainPath) -> None:
    """For Gaussian data E[x_{i-1} | x_i] by conditioning; with the exact noise the step's mean is that."""
    x = torch.tensor([[-1.3], [0.4], [2.0]], dtype=torch.float64)
    for step in (1, 2, chain.steps // 2, chain.steps):
        t, before = step / chain.steps, torch.tensor((step - 1) / chain.steps, dtype=torch.float64)
        variance = GAUSSIAN.marginal(chain, t).covariance().item()
        variance_before = (chain.alpha(before) ** 2 * STD**2 + chain.sigma(before) ** 2).item()
        expected = math.sqrt(1 - chain.betas[step - 1]) * variance_before / variance * x
        predicted = GAUSSIAN.predict(chain, "noise", x, t)
        got = ancestral_step(chain, x, predicted, step, torch.zeros_like(x))
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@CHAINS
@pytest.mark.parametrize(("variance", "std"), [("posterior", 0.0), ("beta", 1.0)])
def test_each_ancestral_variance_is_exact_where_it_should_be(
    chain: ChainPath, variance: str, std: float
) -> None:
    """Points keep sigma^2 with the posterior's variance, unit noise keeps 1 with beta: Ho et al., 3.2.

    The variance of x_i is carried through the steps, with the exact noise, which is linear in x.
    """
    known = 1.0 if std else chain.sigma(ONE).item() ** 2
    for step in range(chain.steps, 1, -1):
        t = torch.tensor([(step - 1) / chain.steps, step / chain.steps], dtype=torch.float64)
        total = chain.alpha(t) ** 2 * std**2 + chain.sigma(t) ** 2
        predicted = chain.sigma(t[1:]) / total[1:]  # of x = 1
        gain = ancestral_step(chain, ONE, predicted, step, ZERO, variance).item()
        added = ancestral_step(chain, ZERO, ZERO, step, ONE, variance).item()
        known = gain**2 * known + added**2
        assert known == pytest.approx(total[0].item(), rel=1e-10)


def test_the_last_ancestral_step_adds_no_noise() -> None:
    chain = ChainPath(linear_betas(10))
    for variance in ("posterior", "beta"):
        assert torch.equal(
            ancestral_step(chain, ONE, ONE / 2, 1, ONE, variance),
            ancestral_step(chain, ONE, ONE / 2, 1, ZERO),
        )


def test_ancestral_sampling_evaluates_every_grid_point_and_follows_the_generator() -> None:
    chain, times = ChainPath(linear_betas(8, 0.01, 0.5)), []

    def network(x: Tensor, t: Tensor) -> Tensor:
        times.append(t.tolist())
        return x

    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    first, second = (
        sample_ancestral(chain, network, x, generator=torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert first.shape == x.shape and torch.equal(first, second)
    assert times[:8] == [[i / 8] * 2 for i in range(8, 0, -1)]
    assert len(times) == 16


def euler_maruyama(path: Path, times: Tensor, rate: Callable[[Tensor], Tensor] | None, of: str) -> float:
    """Variance at the end of sample_sde on Gaussian data, from the exact start, step by step.

    A step is linear here, x -> gain x + spread z; both are read off one step from 0 and 1 with known z.
    """
    network = GAUSSIAN.network(path, of)
    variance = GAUSSIAN.marginal(path, float(times[0])).covariance().item()
    z = torch.randn(2, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for pair in zip(times[:-1], times[1:], strict=True):
        x, same = torch.cat([ZERO, ONE])[:, None], torch.Generator().manual_seed(0)
        x = sample_sde(path, network, x, torch.stack(pair), of=of, noise_rate=rate, generator=same)
        spread = (x[0] / z[0]).item()
        gain = (x[1] - spread * z[1]).item()
        variance = gain**2 * variance + spread**2
    return variance


SDES: dict[str, tuple[Path, Callable[[Tensor], Tensor] | None, str]] = {
    "reverse SDE, linear": (LinearBetaPath(), None, "score"),
    "reverse SDE, cosine": (CosinePath(), None, "noise"),
    "reverse SDE, chain": (ChainPath(linear_betas(4, 0.1, 0.5)), None, "data"),
    "ODE": (LinearBetaPath(), torch.zeros_like, "noise"),
    "rectified, sqrt(t)": (RectifiedPath(), torch.sqrt, "velocity"),
    "rectified, constant": (RectifiedPath(), torch.ones_like, "velocity"),
    "twice the noise": (LinearBetaPath(), lambda t: 2 * LinearBetaPath().diffusion(t), "score"),
}


@pytest.mark.parametrize(("path", "rate", "of"), SDES.values(), ids=SDES.keys())
def test_every_sde_of_the_family_has_the_marginals_at_weak_order_one(
    path: Path, rate: Callable[[Tensor], Tensor] | None, of: str
) -> None:
    """With the half in the wrong place, or left out, the error would tend to a constant: order 0."""
    exact = GAUSSIAN.marginal(path, 0.25).covariance().item()
    errors = [
        abs(euler_maruyama(path, torch.linspace(0.75, 0.25, n + 1, dtype=torch.float64), rate, of) - exact)
        for n in (64, 128)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("name", ["euler", "heun", "midpoint", "rk4", "heun_corrected", "ab3"])
def test_the_probability_flow_ode_has_the_order_of_its_solver(name: str) -> None:
    """On Gaussian data it scales x as the standard deviation of x_t: x_t = x_1 S(t)/S(1), exactly.

    Solvers that reach their order later than at 32 steps, or have no fixed steps, have tests of their own.
    """
    solver = SOLVERS[name]
    path = LinearBetaPath()
    velocity = as_velocity(path, GAUSSIAN.network(path, "score"), "score")
    scale = [GAUSSIAN.marginal(path, t).covariance().sqrt().item() for t in (0.9, 0.1)]
    errors = []
    for steps in (32, 64):
        times = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64)
        end = integrate(solver, velocity, torch.ones(1, 1, dtype=torch.float64), times)
        errors.append(abs(end.item() - scale[1] / scale[0]))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(solver.order, abs=0.1)


def test_wrong_input_is_refused() -> None:
    chain, path, x = ChainPath(linear_betas(10)), LinearBetaPath(), torch.zeros(2, 1)
    for step in (0, 11):
        for call in (lambda i: forward_step(chain, x, i, x), lambda i: ancestral_step(chain, x, x, i, x)):
            with pytest.raises(ValueError, match=f"between 1 and 10, got {step}"):
                call(step)
    with pytest.raises(ValueError, match="learned"):
        sample_ancestral(chain, lambda x, t: x, x, variance="learned")
    for times in ([1.0], [0.5, 0.5], [0.1, 0.9]):
        with pytest.raises(ValueError, match="descend"):
            sample_sde(path, lambda x, t: x, x, times, of="noise")
    with pytest.raises(ValueError, match="no finite drift at t = 1"):
        sample_sde(RectifiedPath(), lambda x, t: x, x, [1.0, 0.5])
