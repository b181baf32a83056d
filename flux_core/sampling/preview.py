"""Fast preview of a latent: each position becomes one pixel, by a linear map of its channels.

The map belongs to the autoencoder of the latents. `fit` determines it from pairs of latents and images; it is
stored in the metadata of the transformer's file (`to_metadata`, `from_metadata`). Without it the channel with
the largest variance is shown in gray.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

KEY = "preview_factors"
"""Metadata key: a JSON list of 17 rows [red, green, blue], one per channel and last the bias."""


@dataclass(frozen=True)
class Factors:
    """rgb in -1..1 = weight^T channels + bias: `weight` [16, 3], `bias` [3], for latents in model space."""

    weight: Tensor
    bias: Tensor


def to_rgb(latent: Tensor, factors: Factors | None = None) -> Tensor:
    """Pixels [h, w, 3], uint8 on the CPU, of the first of the latents [B, 16, h, w] in model space."""
    first = latent[0].detach().float().cpu()
    if factors is None:
        return _gray(first)
    rgb = torch.einsum("chw,ck->hwk", first, factors.weight) + factors.bias
    return ((rgb.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def fit(latents: Tensor, images: Tensor) -> Factors:
    """Least-squares map from latents [B, 16, h, w] in model space to images [B, 3, H, W] in -1..1."""
    small = F.interpolate(images.float(), size=latents.shape[-2:], mode="area")
    channels = rearrange(latents.float(), "b c h w -> (b h w) c")
    inputs = torch.cat([channels, torch.ones_like(channels[:, :1])], dim=1).double()
    solution = torch.linalg.lstsq(inputs, rearrange(small, "b k h w -> (b h w) k").double()).solution.float()
    return Factors(solution[:-1], solution[-1])


def to_metadata(factors: Factors) -> dict[str, str]:
    """The factors as safetensors metadata."""
    rows = torch.cat([factors.weight, factors.bias[None]])
    return {KEY: json.dumps([[round(value, 5) for value in row] for row in rows.tolist()])}


def from_metadata(metadata: Mapping[str, str]) -> Factors | None:
    """The factors in metadata, None without any. Raises ValueError unless they have shape [17, 3]."""
    if KEY not in metadata:
        return None
    try:
        rows = torch.tensor(json.loads(metadata[KEY]), dtype=torch.float32)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the file's {KEY} must be a JSON list of 17 rows of 3 values; export it again"
        ) from error
    if rows.shape != (17, 3):
        raise ValueError(f"the file's {KEY} must have shape [17, 3], got {[*rows.shape]}; export it again")
    return Factors(rows[:-1], rows[-1])


def _gray(latent: Tensor) -> Tensor:
    """Pixels [h, w, 3] of the channel with the largest variance, from black to white."""
    channel = latent[latent.var(dim=(1, 2)).argmax()]
    span = (channel.amax() - channel.amin()).clamp(min=1e-6)
    return (255 * (channel - channel.amin()) / span).to(torch.uint8)[..., None].expand(-1, -1, 3).contiguous()
