"""GroupNorm on a CPU in channels-last memory against float64: torch's own is off by up to 5e-5 here."""

from __future__ import annotations

import pytest
import torch
from rectiflux.benchmarks.reference.models import relative_error
from rectiflux.flux_core.model import group_norm as group_norm_module
from rectiflux.flux_core.model.group_norm import ChannelMoments, GroupNorm
from torch import Tensor


def example(batch: int, channels: int, height: int, width: int) -> Tensor:
    """Channels of different means, channels last in memory."""
    x = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))
    x += torch.linspace(-3, 5, channels)[:, None, None]
    return x.contiguous(memory_format=torch.channels_last)


def group_norm(groups: int, channels: int) -> GroupNorm:
    generator = torch.Generator().manual_seed(2)
    norm = GroupNorm(groups, channels, eps=1e-6).requires_grad_(False)
    norm.weight.copy_(torch.randn(channels, generator=generator))
    norm.bias.copy_(torch.randn(channels, generator=generator))
    return norm


def exact(x: Tensor, norm: GroupNorm) -> Tensor:
    """In float64 and contiguous memory, where torch adds pairwise."""
    weight, bias = norm.weight.double(), norm.bias.double()
    return torch.nn.functional.group_norm(x.double().contiguous(), norm.num_groups, weight, bias, norm.eps)


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((1, 128, 320, 256), 32), ((1, 16, 513, 511), 1), ((2, 24, 97, 65), 4), ((1, 8, 1, 5), 2)],
)
def test_is_exact_at_any_size(shape: tuple[int, int, int, int], groups: int) -> None:
    x, norm = example(*shape), group_norm(groups, shape[1])
    result = norm(x)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(result, exact(x, norm)) < 2e-6
    rounded = norm.bfloat16()(x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert relative_error(rounded, exact(x.bfloat16(), norm)) < 2**-7


def test_gradients_are_those_of_float64() -> None:
    x, norm = example(1, 8, 80, 80), group_norm(2, 8)
    needed = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    x.requires_grad_()
    (grad,) = torch.autograd.grad(norm(x), x, needed)
    (expected,) = torch.autograd.grad(exact(x, norm), x, needed.double())
    assert relative_error(grad, expected) < 1e-4


@pytest.mark.parametrize("devices", [group_norm_module.FUSED_STATISTICS, ()], ids=["cpu, cuda", "others"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_of_parts_are_those_of_the_whole(
    dtype: torch.dtype, devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of strips of different heights, with a mean a hundred standard deviations from 0."""
    monkeypatch.setattr(group_norm_module, "FUSED_STATISTICS", devices)
    x, norm = example(1, 8, 90, 70).to(dtype) + 100, group_norm(4, 8).to(dtype)
    moments = ChannelMoments()
    for part in x.split([40, 10, 40], dim=2):
        moments.add(part)
    result = torch.cat([moments.normalize(part, norm) for part in x.split(30, dim=2)], dim=2)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert relative_error(result, exact(x, norm)) < tolerance
