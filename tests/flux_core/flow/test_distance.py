"""Energy distance against naive loops, closed forms on the line, and its mean over many draws."""

from __future__ import annotations

import math

import pytest
import torch
from rectiflux.flux_core.flow.distance import energy_distance, energy_floor, mean_distance
from torch import Tensor


def drawn(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(x: Tensor, y: Tensor) -> float:
    pairs = [math.dist(a, b) for a in x.tolist() for b in y.tolist()]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("d", [1, 2, 7])
def test_distances_and_their_combination_against_a_loop(d: int) -> None:
    x, y = drawn(70, d, 0) + 5, 2 * drawn(130, d, 1)
    assert mean_distance(x, y) == pytest.approx(naive(x, y), rel=1e-12)
    expected = 2 * naive(x, y) - naive(x, x) - naive(y, y)
    assert energy_distance(x, y) == pytest.approx(expected, abs=1e-7)
    assert energy_distance(y, x) == pytest.approx(expected, abs=1e-7)


def test_single_precision_far_from_the_origin() -> None:
    x, y = drawn(500, 2, 2), drawn(400, 2, 3) + 0.1
    far = torch.tensor([300.0, -200.0])
    close = energy_distance(x, y)
    assert energy_distance(x.float() + far, y.float() + far) == pytest.approx(close, rel=1e-3)


def test_on_the_line_it_is_twice_the_squared_difference_of_the_distribution_functions() -> None:
    """D^2 = 2 * integral of (F - G)^2 for d = 1 (Szekely and Rizzo 2013)."""
    x, y = drawn(200, 1, 4), drawn(150, 1, 5) * 1.5 + 0.3
    ends = torch.cat([x, y]).flatten().sort().values
    f = torch.searchsorted(x.flatten().sort().values, ends, right=True) / 200
    g = torch.searchsorted(y.flatten().sort().values, ends, right=True) / 150
    integral = ((f - g)[:-1].square() * ends.diff()).sum().item()
    assert energy_distance(x, y) == pytest.approx(2 * integral, abs=1e-6)


def test_the_floor_is_the_mean_over_draws_of_one_distribution() -> None:
    """400 pairs of samples of 40 and 60 points; the standard error of their mean is 3 %."""
    values = [energy_distance(drawn(40, 2, 2 * k), drawn(60, 2, 2 * k + 1)) for k in range(400)]
    mean = sum(values) / len(values)
    assert energy_floor(drawn(2000, 2, 900), 60) * (1 / 40 + 1 / 60) / (1 / 2000 + 1 / 60) == pytest.approx(
        mean, rel=0.1
    )


def test_the_floor_of_normal_points_in_closed_form() -> None:
    """E|X - X'| of two standard normal points of the plane is sqrt(pi)."""
    floor = energy_floor(drawn(4000, 2, 7), 1000)
    assert floor == pytest.approx(math.sqrt(math.pi) * (1 / 4000 + 1 / 1000), rel=0.02)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[5, 2\] and \[5, 3\]"):
        energy_distance(torch.zeros(5, 2), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="two points, got 1"):
        energy_floor(torch.zeros(1, 2), 10)
