"""Fill: inpainting and outpainting by a model that sees the masked image and the mask.

A FLUX.1 Fill model reads 384 values a token: 64 of the noisy latent, 64 of the image with the hole in gray,
256 of the mask (an 8 x 8 square of pixels for each element of the latent). Sources: black-forest-labs/flux,
src/flux/sampling.py: prepare_fill; diffusers, pipeline_flux_fill.py; ComfyUI 0.33, comfy/model_base.py:
Flux.concat_cond.

A mask is [B or 1, 1, H, W] or [B or 1, H, W], 1 where the image is to be filled.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..model.spec import Conditioning

FACTOR = 8
"""Pixels of a side for one element of a latent."""


def as_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Mask [B, 1, height, width], float32 in 0..1, from one of any sides, resized bilinearly."""
    mask = mask.float().reshape(-1, 1, *mask.shape[-2:])
    if mask.shape[-2:] != (height, width):
        mask = F.interpolate(mask, size=(height, width), mode="bilinear")
    return mask.clamp(0, 1)


def masked_image(image: Tensor, mask: Tensor) -> Tensor:
    """The image [B, 3, H, W] in -1..1 with mid-gray (0) where the mask, rounded, is 1."""
    return image * (1 - as_mask(mask, *image.shape[-2:]).round()).to(image)


def mask_channels(mask: Tensor) -> Tensor:
    """Channels [B, 64, H/8, W/8] of a mask [B, 1, H, W]: the 8 x 8 square of each element, row by row."""
    return rearrange(mask, "b 1 (h i) (w j) -> b (i j) h w", i=FACTOR, j=FACTOR)


def with_masked_latent(
    conditioning: Conditioning, latent: Tensor, mask: Tensor | None = None
) -> Conditioning:
    """The conditioning of a Fill model, from the latent [B or 1, 16, h, w] of `masked_image` in model space.

    A soft mask stays soft in its channels. Without a mask everything is filled. Raises ValueError for masks
    of another batch size.

    Example: `with_masked_latent(prompt, to_model_space(autoencoder.encode(masked_image(x, mask))), mask)`.
    """
    height, width = (FACTOR * side for side in latent.shape[-2:])
    whole = torch.ones(1, 1, height, width)
    channels = mask_channels(whole if mask is None else as_mask(mask, height, width))
    batch = max(len(latent), len(channels))
    if {len(latent), len(channels)} - {1, batch}:
        raise ValueError(
            f"a mask must be for 1 image or for all {len(latent)}, got {len(channels)}; "
            "make the batches equal"
        )
    parts = [part.expand(batch, -1, -1, -1) for part in (latent, channels.to(latent))]
    return replace(conditioning, extra=torch.cat(parts, dim=1))


def feathered(mask: Tensor, radius: int) -> Tensor:
    """The mask [B, 1, H, W] widened by about `radius` pixels with a soft edge; 1 where it was 1.

    Pixels farther than `radius` from the mask stay 0 exactly.
    """
    if radius < 1:
        return mask
    inner = radius // 2
    grown = F.max_pool2d(mask, 2 * inner + 1, stride=1, padding=inner) if inner else mask
    blur = radius - inner
    soft = F.avg_pool2d(F.pad(grown, (blur, blur, blur, blur), mode="replicate"), 2 * blur + 1, stride=1)
    return torch.maximum(soft, mask)


def composite(original: Tensor, generated: Tensor, mask: Tensor, feather: int = 8) -> Tensor:
    """The original image [B, 3, H, W] with the generated one in the mask, blended over `feather` pixels.

    Values may have any range. Pixels farther than `feather` from the mask are the original's own, bit by bit.
    Raises ValueError for images of different sizes, and for batches that are neither 1 nor equal.
    """
    batches = {len(original), len(generated), len(mask)} - {1}
    if len(batches) > 1:
        raise ValueError(
            f"original, generated image and mask must be 1 each or equally many, got {len(original)}, "
            f"{len(generated)} and {len(mask)}; make the batches equal"
        )
    if original.shape[-2:] != generated.shape[-2:]:
        sizes = [f"{image.shape[-1]}x{image.shape[-2]}" for image in (original, generated)]
        raise ValueError(f"the images must have one size, got {sizes[0]} and {sizes[1]}; resize one of them")
    soft = feathered(as_mask(mask, *original.shape[-2:]), feather).to(original)
    return torch.where(soft > 0, torch.lerp(original, generated.to(original), soft), original)


def outpaint(
    image: Tensor, left: int, top: int, right: int, bottom: int, gray: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The image [B, 3, H, W] with borders of so many pixels, and their mask [B, 1, H', W'].

    `gray` is the borders' value: 0 is mid-gray in -1..1, 0.5 in 0..1. Raises ValueError for negative borders.
    """
    if min(left, top, right, bottom) < 0:
        raise ValueError(f"borders must be 0 or more pixels, got {(left, top, right, bottom)}")
    borders = (left, right, top, bottom)
    mask = F.pad(torch.zeros_like(image[:, :1]), borders, value=1.0)
    return F.pad(image, borders, value=gray), mask
