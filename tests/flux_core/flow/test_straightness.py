"""Straightness: 0 on straight paths, and sums and integrals that are done by hand."""

from __future__ import annotations

import math

import pytest
import torch
from rectiflux.flux_core.flow.straightness import PathRecorder, straightness, transport_cost
from rectiflux.flux_core.sampling.solver import SOLVERS, integrate
from torch import Tensor

NOISE = torch.randn(300, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint", "rk4"])
def test_a_straight_coupling_has_straightness_0(solver: str) -> None:
    """Noise z goes to 3 z - 1: between them x = (3 - 2 t) z - (1 - t), with velocity 1 - 2 z."""

    def velocity(x: Tensor, t: float) -> Tensor:
        return 1 - 2 * (x + 1 - t) / (3 - 2 * t)

    assert straightness(velocity, NOISE, 7, SOLVERS[solver]) < 1e-28
    assert straightness(velocity, NOISE.float(), 7, SOLVERS[solver]) < 1e-9


@pytest.mark.parametrize("steps", [2, 5, 100])
def test_a_velocity_of_time_alone_over_a_number_of_steps(steps: int) -> None:
    """v = a t in each of six elements: Euler's are a k / N for k = 1..N, whose variance is known."""
    value = straightness(lambda x, t: torch.full_like(x, 4.0 * t), NOISE, steps)
    assert value == pytest.approx(6 * 16 * (steps**2 - 1) / (12 * steps**2), rel=1e-12)


def test_many_steps_give_the_integral() -> None:
    """dx/dt = x: X_t = z e^(t-1), S = E z^2 (integral of e^(2t-2), less (1 - 1/e)^2) in each element."""
    per_element = (1 - math.exp(-2)) / 2 - (1 - math.exp(-1)) ** 2
    expected = NOISE.square().mean().item() * 6 * per_element
    assert straightness(lambda x, t: x, NOISE, 4000, SOLVERS["rk4"]) == pytest.approx(expected, rel=2e-3)


def test_samples_keep_their_own_figure_over_unequal_steps() -> None:
    """Steps 1 -> 0.5 -> 0.25 -> 0 with velocities 4 s, 2 s, s: chord 2.75 s, S = 1.6875 s^2."""
    values = {1.0: 4.0, 0.5: 2.0, 0.25: 1.0}
    scale = torch.tensor([[1.0], [-2.0]])
    recorder = PathRecorder()
    end = integrate(
        SOLVERS["euler"], lambda x, t: values[t] * scale, torch.zeros(2, 1), [1, 0.5, 0.25, 0], recorder
    )
    torch.testing.assert_close(recorder.straightness(end), torch.tensor([1.6875, 6.75]).double())


def test_a_part_of_the_way_counts_as_a_whole() -> None:
    """v = 4 t from 1 to 0.5 in two steps: velocities 4 and 3 about a chord of 3.5."""
    recorder = PathRecorder()
    end = integrate(
        SOLVERS["euler"], lambda x, t: torch.full_like(x, 4 * t), torch.zeros(1, 1), [1, 0.75, 0.5], recorder
    )
    torch.testing.assert_close(recorder.straightness(end, 0.5), torch.tensor([0.25]).double())


def test_the_transport_cost_is_the_mean_square_of_the_way() -> None:
    x0, noise = torch.tensor([[[0.0], [1.0]], [[2.0], [2.0]]]), torch.tensor([[[3.0], [5.0]], [[2.0], [1.0]]])
    assert transport_cost(x0, noise) == (9 + 16 + 0 + 1) / 2


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="two steps"):
        straightness(lambda x, t: x, NOISE, 1)
    with pytest.raises(ValueError, match="sigma 0"):
        integrate(SOLVERS["euler"], lambda x, t: x, NOISE, [0.0, 1.0], PathRecorder())
    with pytest.raises(ValueError, match="on_step"):
        PathRecorder().straightness(NOISE)
    with pytest.raises(ValueError, match=r"\[2, 3\] and \[2, 4\]"):
        transport_cost(torch.zeros(2, 3), torch.zeros(2, 4))
