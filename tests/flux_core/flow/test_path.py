"""Paths: their ends, their rates against autograd, their SDEs, and the published schedules."""

from __future__ import annotations

import math

import pytest
import torch
from rectiflux.flux_core.flow import (
    ChainPath,
    CosinePath,
    LinearBetaPath,
    Path,
    RectifiedPath,
    VariancePreservingPath,
    cosine_betas,
    linear_betas,
)

from .closed_form import ALL, PATHS

DIFFUSIONS = pytest.mark.parametrize("path", list(PATHS.values())[1:], ids=list(PATHS)[1:])
TIMES = torch.linspace(0.013, 0.987, 40, dtype=torch.float64)  # none of them on a chain's grid


LEFT_AT_THE_END = {
    "rectified": 0.0,
    "linear": math.exp(-(0.1 + 20) / 4),  # 0.0066
    "cosine": 0.0,
    "linear chain": math.sqrt(4.0358e-5),  # alpha_bar of Ho et al. 2020's betas, by numpy.cumprod
    "cosine chain": math.cos(0.98 / 1.008 * math.pi / 2 + 0.008 / 1.008 * math.pi / 2)
    / math.cos(0.008 / 1.008 * math.pi / 2)
    * math.sqrt(0.001),  # one clipped step, by beta 0.999, from alpha(49/50)
}


@pytest.mark.parametrize("name", PATHS)
def test_a_path_begins_at_the_data_and_ends_near_the_noise(name: str) -> None:
    x0, noise = torch.tensor([1.5, -2.0]).double(), torch.tensor([0.25, 3.0]).double()
    assert torch.equal(PATHS[name].draw(x0, noise, 0.0), x0)
    left = PATHS[name].alpha(torch.ones(()).double()).item()
    assert left == pytest.approx(LEFT_AT_THE_END[name], rel=1e-4, abs=1e-15)


@ALL
def test_rates_are_the_derivatives(path: Path) -> None:
    t = TIMES.clone().requires_grad_()
    (alpha_rate,) = torch.autograd.grad(path.alpha(t).sum(), t)
    (sigma_rate,) = torch.autograd.grad(path.sigma(t).sum(), t)
    torch.testing.assert_close(path.alpha_rate(TIMES), alpha_rate, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(path.sigma_rate(TIMES), sigma_rate, rtol=1e-12, atol=1e-12)


@ALL
def test_drift_and_diffusion_are_those_of_the_marginals(path: Path) -> None:
    """An SDE with drift f x and diffusion g has mean' = f mean and variance' = 2 f variance + g^2."""
    alpha, sigma, g = path.alpha(TIMES), path.sigma(TIMES), path.diffusion(TIMES)
    torch.testing.assert_close(path.drift(TIMES) * alpha, path.alpha_rate(TIMES), rtol=1e-12, atol=1e-12)
    variance_rate = 2 * path.drift(TIMES) * sigma**2 + g**2
    torch.testing.assert_close(variance_rate, 2 * sigma * path.sigma_rate(TIMES), rtol=1e-11, atol=1e-11)


@DIFFUSIONS
def test_diffusions_preserve_variance(path: VariancePreservingPath) -> None:
    torch.testing.assert_close(path.alpha(TIMES) ** 2 + path.sigma(TIMES) ** 2, torch.ones_like(TIMES))
    torch.testing.assert_close(path.drift(TIMES), -path.beta(TIMES) / 2)
    torch.testing.assert_close(path.diffusion(TIMES) ** 2, path.beta(TIMES))


def test_published_schedules() -> None:
    """Song et al. 2021, appendix C, and Nichol and Dhariwal 2021, eq. 17, as they are printed."""
    t = TIMES
    alpha = torch.exp(-(t**2) * (20 - 0.1) / 4 - t * 0.1 / 2)
    torch.testing.assert_close(LinearBetaPath().alpha(t), alpha, rtol=1e-14, atol=0)
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    expected = f / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(CosinePath().alpha(t) ** 2, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(CosinePath().sigma(t) ** 2, 1 - expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("betas", [linear_betas(1000), cosine_betas(50)], ids=["linear", "cosine"])
def test_a_chain_has_its_products_at_its_grid_points(betas: torch.Tensor) -> None:
    chain, steps = ChainPath(betas), len(betas)
    torch.testing.assert_close(chain.alpha_bars, torch.cumprod(1 - betas, 0), rtol=1e-12, atol=0)
    grid = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    torch.testing.assert_close(chain.alpha(grid) ** 2, chain.alpha_bars, rtol=1e-12, atol=0)
    for times in (grid, grid.float()):  # float32 i/T is not quite i/T
        expected = (-steps * torch.log1p(-betas)).to(times.dtype)
        assert torch.equal(chain.beta(times), expected)


def test_cosine_betas_are_clipped() -> None:
    betas = cosine_betas(1000)
    assert betas.max() == 0.999 and (betas == 0.999).sum() == 1
    unclipped = CosinePath().alpha(torch.arange(1000).double() / 1000)[1:] ** 2
    torch.testing.assert_close(ChainPath(betas).alpha_bars[:-1], unclipped, rtol=1e-10, atol=0)


def test_the_chain_tends_to_the_continuous_path_at_order_one() -> None:
    """DDPM's betas scaled to T steps against beta(t) from 0.1 to 20: the error of log alpha_bar is O(1/T)."""
    errors = []
    for steps in (1000, 2000):
        chain = ChainPath(linear_betas(steps, 0.1 / steps, 20 / steps))
        t = torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
        errors.append((chain.log_alpha_bar(t) - LinearBetaPath().log_alpha_bar(t)).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.05)


@ALL
def test_time_at_inverts_level(path: Path) -> None:
    torch.testing.assert_close(path.time_at(path.level(TIMES)), TIMES, rtol=0, atol=1e-13)
    ends = path.time_at(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0]).double(), rtol=0, atol=1e-13)
    assert torch.all((ends >= 0) & (ends <= 1))


def test_levels_that_a_path_does_not_reach_are_its_end() -> None:
    path = LinearBetaPath()
    reached = path.level(torch.ones((), dtype=torch.float64))
    assert reached < 0.994
    assert torch.equal(path.time_at(torch.tensor([0.994, 0.9999])), torch.ones(2))


@ALL
def test_one_time_per_sample_goes_with_any_trailing_shape(path: Path) -> None:
    x0, noise = torch.randn(2, 5, 3, 2, 4, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    for method in (path.draw, path.velocity):
        together = method(x0, noise, t)
        assert together.shape == x0.shape
        for i in range(5):
            alone = method(x0[i : i + 1], noise[i : i + 1], float(t[i]))
            torch.testing.assert_close(together[i : i + 1], alone, rtol=2e-4, atol=2e-4)


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_of_x_is_kept(path: Path, dtype: torch.dtype) -> None:
    x = torch.ones(2, 3, dtype=dtype)
    for t in (0.5, torch.tensor(0.5), torch.tensor([0.25, 0.5]), torch.tensor([0.25, 0.5]).double()):
        assert path.draw(x, x, t).dtype == path.velocity(x, x, t).dtype == dtype


def test_wrong_times_are_refused() -> None:
    path, x = RectifiedPath(), torch.zeros(3, 2)
    for t in (torch.zeros(2), torch.zeros(3, 1)):
        with pytest.raises(ValueError, match=rf"got shape \{list(t.shape)} for x \[3, 2\]"):
            path.velocity(x, x, t)
    for t in (-0.1, 1.5, math.nan, torch.tensor([0.5, 2.0, 0.5])):
        with pytest.raises(ValueError, match=f"got {t if isinstance(t, float) else 2.0}"):
            path.draw(x, x, t)


def test_infinite_rates_are_refused() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="LinearBetaPath has no finite velocity at t = 0"):
        LinearBetaPath().velocity(x, x, torch.tensor([0.5, 0.0]))
    with pytest.raises(ValueError, match="RectifiedPath has no finite drift at t = 1"):
        RectifiedPath().diffusion(torch.ones(()))
    with pytest.raises(ValueError, match="CosinePath has no finite beta at t = 1"):
        CosinePath().drift(torch.ones((), dtype=torch.float64))


def test_wrong_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="beta_min 0.0 and beta_max 20.0"):
        LinearBetaPath(0.0)
    with pytest.raises(ValueError, match="got 0"):
        CosinePath(0)
    for betas in (torch.tensor([0.1, 1.0]), torch.tensor([[0.1]]), torch.tensor([])):
        with pytest.raises(ValueError, match="betas"):
            ChainPath(betas)
    for make in (linear_betas, cosine_betas):
        with pytest.raises(ValueError, match="got 0"):
            make(0)
