"""A transformer of two blocks for the miniature's text encoders, and inputs for it."""

from __future__ import annotations

import torch
from rectiflux.flux_core import FluxSpec, FluxTransformer
from rectiflux.flux_core.model.spec import Conditioning
from rectiflux.miniature.text_encoders import WIDTH

TINY = FluxSpec(hidden_size=64, num_heads=1, depth=1, depth_single=1, context_in=WIDTH, vec_in=WIDTH)
SIZES = ((64, 32, 1.0),)


def network() -> FluxTransformer:
    torch.manual_seed(0)
    return FluxTransformer(TINY)


def inputs(batch: int) -> tuple[torch.Tensor, Conditioning]:
    """Noise and text."""
    torch.manual_seed(2)
    text = Conditioning(torch.randn(batch, 5, WIDTH), torch.randn(batch, WIDTH))
    return torch.randn(batch, 16, 4, 8), text


def noise_with_means(*means: float) -> torch.Tensor:
    """Noise [16, 4, 8] whose first channels have these means, the others zero."""
    noise = torch.randn(16, 4, 8, generator=torch.Generator().manual_seed(0))
    noise -= noise.mean(dim=(1, 2), keepdim=True)
    noise[: len(means)] += torch.tensor(means)[:, None, None]
    return noise
