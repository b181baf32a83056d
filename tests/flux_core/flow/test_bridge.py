"""One network on another path: exactly the other path's prediction, and samples of one distribution."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from rectiflux.flux_core.flow import (
    KINDS,
    ChainPath,
    CosinePath,
    LinearBetaPath,
    Path,
    RectifiedPath,
    as_rectified,
    as_velocity,
    energy_distance,
    linear_betas,
    sample_ancestral,
    sample_sde,
    transfer,
)
from rectiflux.flux_core.sampling.solver import SOLVERS, integrate
from torch import Tensor

from .closed_form import MIXTURE, PATHS

CHAIN = ChainPath(linear_betas(250, 4e-4, 0.08))  # Ho et al.'s betas for a quarter of their steps


@pytest.mark.parametrize("source", PATHS)
@pytest.mark.parametrize("target", PATHS)
def test_a_network_transferred_is_the_other_paths_own(source: str, target: str) -> None:
    """Every prediction of the mixture on the source, as every prediction on the target."""
    x = 1.5 * torch.randn(9, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.linspace(0.05, 0.95, 9, dtype=torch.float64)
    for of in KINDS:
        network = MIXTURE.network(PATHS[source], of)
        for to in KINDS:
            got = transfer(network, of, PATHS[source], PATHS[target], to)(x, t)
            torch.testing.assert_close(got, MIXTURE.predict(PATHS[target], to, x, t), rtol=1e-9, atol=1e-9)


def test_images_are_transferred_sample_by_sample() -> None:
    """t of the network stays [B], whatever the shape of x; by hand on the cosine path at its level 1/2."""
    asked: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return x

    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.full((3,), 0.5, dtype=torch.float64)
    got = transfer(network, "data", CosinePath(), RectifiedPath(), "data")(x, t)
    torch.testing.assert_close(got, x * math.sqrt(2))  # alpha = sigma = 1/sqrt(2) there
    torch.testing.assert_close(CosinePath().alpha(asked[0]), t * math.sqrt(2))


def test_beyond_the_source_its_last_data_are_kept() -> None:
    """alpha(1) = 0.0066 of the linear path is level 0.9935; from there to pure noise v = (x - data)/t."""
    path, x = LinearBetaPath(), torch.tensor([[0.3, -1.0]], dtype=torch.float64)
    velocity = as_rectified(path, MIXTURE.network(path, "noise"), "noise")(x, 1.0)
    one = torch.ones((), dtype=torch.float64)
    data = MIXTURE.predict(path, "data", x * (path.alpha(one) + path.sigma(one)), 1.0)
    torch.testing.assert_close(velocity, x - data)
    exact = MIXTURE.predict(RectifiedPath(), "velocity", x, 1.0)
    torch.testing.assert_close(velocity, exact, rtol=0, atol=5 * path.alpha(one).item())


@pytest.mark.parametrize("path", [LinearBetaPath(), CosinePath()], ids=["linear", "cosine"])
def test_the_rectified_view_follows_the_probability_flow(path: Path) -> None:
    """The same trajectory: from the same point, both ODEs meet at the same level, scaled. RK4 to 1e-6."""
    times = torch.linspace(0.9, 0.2, 101, dtype=torch.float64)
    levels, scales = path.level(times), path.alpha(times) + path.sigma(times)
    network = MIXTURE.network(path, "score")
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flow = integrate(SOLVERS["rk4"], as_velocity(path, network, "score"), x, times)
    rectified = integrate(SOLVERS["rk4"], as_rectified(path, network, "score"), x / scales[0], levels)
    torch.testing.assert_close(rectified * scales[-1], flow, rtol=0, atol=1e-6)


SOURCE = LinearBetaPath()
NETWORK = MIXTURE.network(SOURCE, "noise")
DESCENT = torch.linspace(1, 0, 251, dtype=torch.float64)


def ddpm(noise: Tensor, generator: torch.Generator) -> Tensor:
    predict = transfer(NETWORK, "noise", SOURCE, CHAIN, "noise")
    return sample_ancestral(CHAIN, predict, noise, variance="beta", generator=generator)


def reverse_sde(noise: Tensor, generator: torch.Generator) -> Tensor:
    """Steps shorter towards the data, where the score changes fastest."""
    return sample_sde(SOURCE, NETWORK, noise, DESCENT**2, of="noise", generator=generator)


def flow_ode(noise: Tensor, generator: torch.Generator) -> Tensor:
    return integrate(SOLVERS["heun"], as_velocity(SOURCE, NETWORK, "noise"), noise, DESCENT[::5] ** 2)


def rectified(noise: Tensor, generator: torch.Generator) -> Tensor:
    return integrate(SOLVERS["heun"], as_rectified(SOURCE, NETWORK, "noise"), noise, DESCENT[::5])


def rectified_sde(noise: Tensor, generator: torch.Generator) -> Tensor:
    predict = transfer(NETWORK, "noise", SOURCE, RectifiedPath(), "velocity")
    return sample_sde(
        RectifiedPath(), predict, noise, DESCENT, noise_rate=lambda t: (2 * t).sqrt(), generator=generator
    )


SAMPLERS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    sampler.__name__: sampler for sampler in (ddpm, reverse_sde, flow_ode, rectified, rectified_sde)
}
COUNT = 3000


@pytest.fixture(scope="module")
def limit() -> float:
    """The energy distance that 19 of 20 pairs of samples of the mixture itself stay below."""
    generator = torch.Generator().manual_seed(100)
    return sorted(
        energy_distance(MIXTURE.sample(COUNT, generator), MIXTURE.sample(COUNT, generator)) for _ in range(20)
    )[-2]


@pytest.fixture(scope="module")
def drawn() -> dict[str, Tensor]:
    """COUNT samples of each sampler, each from its own noise."""
    samples = {}
    for seed, (name, sampler) in enumerate(SAMPLERS.items()):
        generator = torch.Generator().manual_seed(seed)
        samples[name] = sampler(torch.randn(COUNT, 2, generator=generator, dtype=torch.float64), generator)
    return samples


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_network_gives_one_distribution_by_every_sampler(
    name: str, drawn: dict[str, Tensor], limit: float
) -> None:
    """Moments within 4 standard errors; energy distance to data as between two samples of data."""
    x = drawn[name]
    assert torch.all((x.mean(0) - MIXTURE.mean()).abs() < 4 * x.std(0) / math.sqrt(COUNT))
    apart = x - MIXTURE.mean()
    products = apart[:, :, None] * apart[:, None, :]
    error = (products.mean(0) - MIXTURE.covariance()).abs()
    assert torch.all(error < 4 * products.std(0) / math.sqrt(COUNT))
    data = MIXTURE.sample(COUNT, torch.Generator().manual_seed(50))
    assert energy_distance(x, data) < limit


def test_a_misplaced_half_would_be_seen(limit: float) -> None:
    """The ODE with the whole g^2, a mistake often printed, is far above the floor."""

    def wrong(x: Tensor, t: float) -> Tensor:
        time = torch.tensor(t, dtype=torch.float64)
        score = MIXTURE.predict(SOURCE, "score", x, t)
        return SOURCE.drift(time) * x - SOURCE.diffusion(time) ** 2 * score

    noise = torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    x = integrate(SOLVERS["heun"], wrong, noise, DESCENT[::5] ** 2)
    assert energy_distance(x, MIXTURE.sample(COUNT, torch.Generator().manual_seed(50))) > 10 * limit
