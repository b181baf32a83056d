"""Muon: updates become orthogonal, have AdamW's size, and find the bottom of a bowl."""

from __future__ import annotations

import pytest
import torch
from rectiflux.flux_core.train.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 48), (48, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_come_near_one(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Jordan's coefficients bring them to 0.7 to 1.2; here for matrices of singular values 0.1 to 1."""
    generator = torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    matrices = u @ torch.diag_embed(torch.linspace(0.1, 1, u.shape[-1])) @ vh
    found = torch.linalg.svdvals(orthogonalize(matrices.to(dtype)).float())
    assert 0.65 < found.min() and found.max() < 1.25


def test_the_directions_stay() -> None:
    """The nearest orthogonal matrix is U V^T; the iteration keeps both and changes only the values."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(20, 12, generator=generator, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    core = u.T @ orthogonalize(matrix, iterations=5) @ vh.T
    assert (core - torch.diag(core.diagonal())).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(32, 64), (8, 4, 3, 3)])
def test_a_step_has_the_size_of_adamws(shape: tuple[int, ...]) -> None:
    """0.2 lr per entry, root mean square (arXiv:2502.16982, equation 4), whatever the gradient's size."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(shape))
    for scale in (1e-3, 1e3):
        parameter.data.zero_()
        parameter.grad = scale * torch.randn(shape)
        Muon([parameter], lr=0.01).step()
        assert parameter.square().mean().sqrt().item() == pytest.approx(0.002, rel=0.25)


def test_weights_decay() -> None:
    """By lr times weight_decay, apart from the step, which a zero gradient does not make."""
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    parameter.grad = torch.zeros(4, 4)
    Muon([parameter], lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(parameter, torch.full((4, 4), 0.95))
