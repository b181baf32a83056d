"""Couplings: the best of all permutations, the model's own pairs against an ODE solved by hand."""

from __future__ import annotations

import itertools
import math
from itertools import islice

import pytest
import torch
from rectiflux.flux_core.flow.coupling import independent, iterated_reflow, optimal_transport, reflow
from rectiflux.flux_core.flow.straightness import transport_cost
from rectiflux.flux_core.sampling.solver import SOLVERS
from torch import Tensor


def drawn(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [(6, 2), (5, 4, 3, 2)])
def test_optimal_transport_is_the_best_of_all_permutations(shape: tuple[int, ...], seed: int) -> None:
    x0, noise = drawn(*shape, seed=seed)
    same, paired = optimal_transport(x0, noise)
    assert same is x0
    costs = [transport_cost(x0, noise[list(order)]) for order in itertools.permutations(range(shape[0]))]
    assert transport_cost(x0, paired) == pytest.approx(min(costs), rel=1e-6)


def test_optimal_transport_moves_rows_and_only_rows() -> None:
    """A permutation of the very same rows, half-precision latents included, and cheaper than before."""
    x0, noise = (t.to(torch.bfloat16) for t in drawn(16, 4, 2, 2))
    _, paired = optimal_transport(x0, noise)
    assert paired.dtype == noise.dtype and paired.shape == noise.shape
    rows = {tuple(row.flatten().tolist()) for row in noise}
    assert {tuple(row.flatten().tolist()) for row in paired} == rows and len(rows) == 16
    assert transport_cost(x0, paired) < transport_cost(x0, noise)


def growth(x: Tensor, sigma: float) -> Tensor:
    """dx/ds = x, which carries noise z at s = 1 to z / e at s = 0."""
    return x


def test_reflow_pairs_are_the_ends_of_the_models_ode() -> None:
    _, noise = drawn(300, 2, 2)
    noise = noise.double()
    x0, same = reflow(growth, noise, torch.linspace(1, 0, 65), SOLVERS["rk4"], chunk=128)
    assert same is noise
    torch.testing.assert_close(x0, noise / math.e, rtol=1e-8, atol=0)


def test_each_round_learns_from_the_pairs_of_the_round_before() -> None:
    """A learner that fits the one constant velocity to its pairs finds the mean of noise - x0."""
    rounds: list[tuple[float, float]] = []

    def learn(before: object, x0: Tensor, noise: Tensor) -> object:
        shift = (noise - x0).mean().item()
        rounds.append((noise[0].item(), shift))
        return lambda x, sigma: torch.full_like(x, 2 * shift)

    draws = iter([torch.ones(3, 1), torch.full((3, 1), 5.0)])
    flows = iterated_reflow(
        lambda x, sigma: 3 * sigma + 0 * x, learn, lambda: next(draws), [1.0, 0.0], SOLVERS["euler"]
    )
    second, third = islice(flows, 2)
    assert rounds == [(1.0, 3.0), (5.0, 6.0)]
    assert second(torch.zeros(1), 0.5).item() == 6.0 and third(torch.zeros(1), 0.5).item() == 12.0


def test_what_cannot_be_paired_is_refused() -> None:
    for couple in (independent, optimal_transport):
        with pytest.raises(ValueError, match=r"\[4, 2\] and \[5, 2\]"):
            couple(torch.zeros(4, 2), torch.zeros(5, 2))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="NaN or inf"):
            optimal_transport(torch.tensor([[0.0], [bad]]), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"0\.9 to 0"):
        reflow(growth, torch.zeros(2, 2), [0.9, 0.0], SOLVERS["euler"])
