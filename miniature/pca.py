"""An encoder with analytically set weights: a principal component analysis of the miniature's images.

For images as simple as these, a linear code of each 8x8 patch (principal components, nested 2x2, 4x4, 8x8)
keeps what a decoder needs, and its latents are easy for a flow to learn: a small image in a few smooth
channels. `set_pca_encoder` sets the weights of FLUX.1's encoder architecture so that it computes exactly that
code: residual branches are zero, the strided convolutions take the patches apart, and the last GroupNorm and
SiLU become linear (constant channels fix the norm's scale; silu(x) - silu(-x) = x). The decoder is trained
(autoencoder.py).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..flux_core.model.autoencoder import SCALE, SHIFT, AutoEncoder, Encoder, Level, ResnetBlock

ANCHOR = 100.0
"""Magnitude of the constant channels before the last GroupNorm; the code's own values are about 1."""
EVENNESS = 0.5
"""A channel's spread is its principal component's to this power: 1 keeps it, 0 equalizes all channels."""


def space_to_depth(x: Tensor) -> Tensor:
    """[B, c, H, W] -> [B, 4 c, H/2, W/2], ordered (c dy dx)."""
    return rearrange(x, "b c (h dy) (w dx) -> b (c dy dx) h w", dy=2, dx=2)


def principal(x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(directions [count, c], spreads [count], mean [c]) of the positions of x [B, c, h, w], float64."""
    rows = rearrange(x.double(), "b c h w -> (b h w) c")
    mean = rows.mean(dim=0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    order = values.argsort(descending=True)[:count]
    return vectors[:, order].T, values[order].clamp_min(1e-12).sqrt(), mean


@torch.no_grad()
def set_pca_encoder(model: AutoEncoder, images: Tensor) -> None:
    """Set the encoder of a 4-level, 1-block autoencoder to the linear code of images [B, 3, H, W] in -1..1.

    Raises ValueError for sizes that are too small for the code.
    """
    spec, encoder = model.spec, model.encoder
    widths = [spec.ch * m for m in spec.ch_mult]
    least = (12, 12, 16, 4 * spec.z_channels)
    if (
        len(widths) != 4
        or spec.num_res_blocks != 1
        or spec.groups != 1
        or any(width < enough for width, enough in zip(widths, least, strict=True))
        or widths[3] == widths[2]
    ):
        raise ValueError(
            "the linear encoder needs 4 levels of 1 block, 1 group, widths of "
            f"{', '.join(map(str, least))} or more and a last width unlike the one before, got {spec}"
        )
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(_bias(module))
            if name.endswith(("conv2", "proj_out")):
                nn.init.zeros_(module.weight)
    kept = min(widths[1], widths[2] // 4)
    half = space_to_depth(images)
    inner, _, _ = principal(space_to_depth(half), kept)
    quarter = torch.einsum("oc,bchw->bohw", inner.float(), space_to_depth(half))
    outer, spread, mean = principal(space_to_depth(quarter), spec.z_channels)

    _identity(encoder.conv_in, 3)
    levels = [cast(Level, level) for level in encoder.down]
    shortcuts = [cast(ResnetBlock, level.block[0]).nin_shortcut for level in levels]
    for level, matrix in zip(levels[:3], (torch.eye(12), inner, torch.eye(4 * kept)), strict=True):
        _patches(level.downsample.conv, matrix)
    for shortcut, channels in zip(shortcuts[1:3], (12, kept), strict=True):
        if isinstance(shortcut, nn.Conv2d):
            _identity(shortcut, channels)

    gain = spread ** (EVENNESS - 1)
    gain = gain / (gain * spread).square().mean().sqrt()
    code = gain[:, None] * outer
    _signed_code(cast(nn.Conv2d, shortcuts[3]), code, -code @ mean)
    _linear_head(encoder, spec.z_channels, widths[3])


def _bias(conv: nn.Conv2d) -> Tensor:
    """The bias, which every convolution of FLUX.1's autoencoder has."""
    return cast(Tensor, conv.bias)


def _identity(conv: nn.Conv2d, channels: int) -> None:
    """Pass on the first channels only."""
    nn.init.zeros_(conv.weight)
    center = conv.weight.shape[-1] // 2
    conv.weight[range(channels), range(channels), center, center] = 1.0


def _patches(conv: nn.Conv2d, matrix: Tensor) -> None:
    """Make a strided 3x3 convolution apply `matrix` [out, 4 c] to each 2x2 patch, ordered (c dy dx)."""
    nn.init.zeros_(conv.weight)
    kernel = rearrange(matrix.float(), "o (c dy dx) -> o c dy dx", dy=2, dx=2)
    conv.weight[: kernel.shape[0], : kernel.shape[1], :2, :2] = kernel


def _signed_code(conv: nn.Conv2d, code: Tensor, offset: Tensor) -> None:
    """Output the code, its negative, and as many constants of +ANCHOR as of -ANCHOR."""
    nn.init.zeros_(conv.weight)
    bias, (z, c) = _bias(conv), code.shape
    conv.weight[:z, :c, 0, 0], bias[:z] = code.float(), offset.float()
    conv.weight[z : 2 * z, :c, 0, 0], bias[z : 2 * z] = -code.float(), -offset.float()
    bias[2 * z :: 2], bias[2 * z + 1 :: 2] = ANCHOR, -ANCHOR


def _linear_head(encoder: Encoder, z: int, width: int) -> None:
    """Undo the last norm's scale and combine the code with its negative, in FLUX.1's raw scale.

    The log variance is a small constant.
    """
    nn.init.zeros_(encoder.norm_out.weight)
    nn.init.zeros_(encoder.norm_out.bias)
    encoder.norm_out.weight[: 2 * z] = ANCHOR * (1 - 2 * z / width) ** 0.5
    nn.init.zeros_(encoder.conv_out.weight)
    for i in range(z):
        encoder.conv_out.weight[i, i, 1, 1] = 1 / SCALE
        encoder.conv_out.weight[i, z + i, 1, 1] = -1 / SCALE
    bias = _bias(encoder.conv_out)
    bias[:z], bias[z:] = SHIFT, -6.0


@torch.no_grad()
def linear_code(model: AutoEncoder) -> tuple[Tensor, Tensor]:
    """(kernel [16, 3, 8, 8], bias [16]): conv2d(image, kernel, bias, stride=8) equals the encoder.

    Measured by impulse responses of an encoder of `set_pca_encoder`; some hundred times as fast as it.
    """
    dark = model.encode(torch.zeros(1, 3, 16, 16))[0, :, 0, 0]
    impulses = torch.zeros(192, 3, 16, 16)
    impulses[:, :, :8, :8] = torch.eye(192).view(192, 3, 8, 8)
    responses = torch.cat([model.encode(part)[:, :, 0, 0] for part in impulses.split(32)])
    return rearrange(responses - dark, "(c y x) z -> z c y x", c=3, y=8), dark


def encode_linear(images: Tensor, code: tuple[Tensor, Tensor]) -> Tensor:
    """Raw latents [B, 16, h, w] of images [B, 3, H, W] by `linear_code`."""
    return F.conv2d(images, code[0], code[1], stride=8)


def decode_linear(latents: Tensor, code: tuple[Tensor, Tensor]) -> Tensor:
    """Blocky images [B, 3, H, W] of raw latents [B, 16, h, w]: least-squares inverse of `encode_linear`."""
    inverse = torch.linalg.pinv(code[0].flatten(1).double()).float()
    patches = torch.einsum("pz,bzhw->bphw", inverse, latents - code[1][:, None, None])
    return rearrange(patches, "b (c y x) h w -> b c (h y) (w x)", c=3, y=8, x=8)
