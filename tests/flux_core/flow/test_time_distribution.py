"""Time distributions: draws against densities, densities against the paper's formulas."""

from __future__ import annotations

import math

import pytest
import torch
from rectiflux.flux_core.flow import LogitNormalTime, ModeTime, ShiftedTime, TimeDistribution, UniformTime
from rectiflux.flux_core.sampling.schedule import shift_sigmas
from torch import Tensor

DISTRIBUTIONS: dict[str, TimeDistribution] = {
    "uniform": UniformTime(),
    "logit-normal": LogitNormalTime(),
    "logit-normal(0.5, 0.6)": LogitNormalTime(0.5, 0.6),
    "mode(1.29)": ModeTime(1.29),
    "mode(-0.8)": ModeTime(-0.8),
    "shifted uniform": ShiftedTime(UniformTime(), 1.15),
    "shifted mode": ShiftedTime(ModeTime(0.8), -0.5),
}
ALL = pytest.mark.parametrize("times", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())
GRID = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
COUNT = 40_000


@ALL
def test_the_density_integrates_to_one(times: TimeDistribution) -> None:
    """By the midpoint rule; the densities are bounded."""
    assert times.density(GRID).mean().item() == pytest.approx(1, abs=1e-6)


@ALL
def test_draws_have_the_density(times: TimeDistribution) -> None:
    """Kolmogorov and Smirnov at the 0.1 % level (1.95/sqrt(n)); two moments within 4 standard errors."""
    t = times.sample(COUNT, torch.Generator().manual_seed(0), torch.float64).sort().values
    below = torch.cat([torch.zeros(1), times.density(GRID).cumsum(0) / len(GRID)])
    place = t * len(GRID)
    low = place.long().clamp(max=len(GRID) - 1)
    expected = below[low] + (place - low) * (below[low + 1] - below[low])
    steps = torch.arange(COUNT + 1, dtype=torch.float64) / COUNT
    gap = torch.maximum((steps[1:] - expected).max(), (expected - steps[:-1]).max())
    assert gap < 1.95 / math.sqrt(COUNT)
    for power in (1, 2):
        moment = (times.density(GRID) * GRID**power).mean()
        assert abs((t**power).mean() - moment) < 4 * (t**power).std() / math.sqrt(COUNT)


@ALL
def test_draws_follow_the_generator_and_the_dtype(times: TimeDistribution) -> None:
    for dtype in (torch.float32, torch.float64):
        first, second = (times.sample(5, torch.Generator().manual_seed(2), dtype) for _ in range(2))
        assert first.shape == (5,) and first.dtype == dtype and torch.equal(first, second)
    assert times.sample(3).dtype == torch.float32
    assert times.density(torch.tensor([[0.2, 0.5]])).shape == (1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_draws_are_strictly_inside(dtype: torch.dtype) -> None:
    """A logit-normal this wide rounds to 0 and 1 in every dtype; so does a shift by 50."""
    for times in (LogitNormalTime(0, 1000), ShiftedTime(UniformTime(), 50), ShiftedTime(UniformTime(), -50)):
        t = times.sample(1000, torch.Generator().manual_seed(0), dtype)
        epsilon = torch.finfo(dtype).eps
        assert t.min() >= epsilon and t.max() <= 1 - epsilon
        assert t.min() == epsilon or t.max() == 1 - epsilon


def test_logit_normal_by_the_papers_formula() -> None:
    """Esser et al. 2024, eq. 19, at t = 1/2 and at t = 3/4, whose logit is log 3."""
    density = LogitNormalTime(0.5, 2.0).density(torch.tensor([0.5, 0.75], dtype=torch.float64))
    root = 2 * math.sqrt(2 * math.pi)
    expected = [4 / root * math.exp(-(0.5**2) / 8), 16 / 3 / root * math.exp(-((math.log(3) - 0.5) ** 2) / 8)]
    assert density.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", [-0.9, -0.3, 0.0, 0.8, 1.7])
def test_mode_by_its_own_derivative(scale: float) -> None:
    """Density 1/|f'(u)| at f(u), with f of eq. 20 written out; 1/(1 + s) at the ends."""
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64).requires_grad_()
    t = 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    (slope,) = torch.autograd.grad(t.sum(), u)
    torch.testing.assert_close(ModeTime(scale).density(t.detach()), 1 / slope.abs(), rtol=1e-9, atol=0)
    middle, end = ModeTime(scale).density(torch.tensor([0.5, 1e-12], dtype=torch.float64)).tolist()
    assert middle == pytest.approx(1 / (1 + scale * (1 - math.pi / 2)), rel=1e-12)
    assert end == pytest.approx(1 / (1 + scale), rel=1e-9)


def test_a_shift_is_a_translation_of_the_logit() -> None:
    """So a logit-normal shifted by mu is the logit-normal with mean mu, and shifts add up."""
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)

    def density(times: TimeDistribution) -> Tensor:
        return times.density(t)

    shifted = density(ShiftedTime(LogitNormalTime(0.25, 1.5), 1.15))
    torch.testing.assert_close(shifted, density(LogitNormalTime(1.4, 1.5)), rtol=1e-12, atol=0)
    twice = density(ShiftedTime(ShiftedTime(UniformTime(), 0.4), 0.75))
    torch.testing.assert_close(twice, density(ShiftedTime(UniformTime(), 1.15)), rtol=1e-12, atol=0)
    draws = ShiftedTime(UniformTime(), 1.15).sample(9, torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        draws, shift_sigmas(UniformTime().sample(9, torch.Generator().manual_seed(0)), 1.15)
    )


def test_wrong_distributions_are_refused() -> None:
    for std in (0, -1.0, math.inf):
        with pytest.raises(ValueError, match=f"got {std}"):
            LogitNormalTime(0, std)
    for scale in (-1.1, 1.8, math.nan):
        with pytest.raises(ValueError, match=f"got {scale}"):
            ModeTime(scale)
    with pytest.raises(ValueError, match="51"):
        ShiftedTime(UniformTime(), 51)
