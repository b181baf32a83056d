"""Canny edges: kornia's own result, and its refusals."""

from __future__ import annotations

import pytest
import torch
from kornia.filters import canny as kornia_canny
from rectiflux.flux_core.tools.control import canny


@pytest.mark.filterwarnings("ignore")
def test_edges_are_kornias() -> None:
    """With hysteresis by connected components in place of kornia's loop."""
    generator = torch.Generator().manual_seed(0)
    image = (
        torch.rand(2, 3, 12, 16, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3) * 2 - 1
    )
    for low, high in ((0.1, 0.3), (0.3, 0.9)):
        _, expected = kornia_canny((image + 1) / 2, low, high)
        edges = canny(image, low, high)
        assert edges.shape == image.shape and 0 < expected.mean() < 1
        assert torch.equal((edges[:, :1] + 1) / 2, expected)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.3), (0.5, 0.3), (float("nan"), 0.3)])
def test_thresholds_out_of_order_are_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="0 < low <= high"):
        canny(torch.zeros(1, 3, 16, 16), low, high)
