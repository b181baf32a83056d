"""What travels between nodes, checked: LATENT, SIGMAS, NOISE, IMAGE, MASK, the same in every host.

A LATENT is a dictionary; its "samples" are a raw latent [B, 16, h, w], in the scale of the VAE. An IMAGE is
[B, H, W, 3] in 0..1; flux_core works in [B, 3, H, W], -1..1. Values may come from nodes of any pack, and may
belong to another model. For CONDITIONING see conditioning_wires.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..flux_core.pipeline import LATENT_CHANNELS, draw_noise, sizes_near
from ..flux_core.tools.fill import as_mask
from ..flux_core.weights import not_finite_weight
from .conditioning_wires import Entries

LatentWire = dict[str, Any]
"""A LATENT."""

VAE_FACTOR = 8
"""Pixels of a side for one element of FLUX.1's latent."""

# LATENT


def raw_latent_of(wire: LatentWire) -> Tensor:
    """The raw latent [B, 16, h, w] of a LATENT.

    An empty one (all zeros) of another model becomes an empty one for an image of the same size, as in
    ComfyUI. Raises ValueError for another model's latent.
    """
    raw_latent = wire["samples"]
    is_image = isinstance(raw_latent, Tensor) and raw_latent.ndim == 4 and raw_latent.numel() > 0
    if is_image and not torch.count_nonzero(raw_latent):
        return _empty_like(raw_latent, wire.get("downscale_ratio_spacial") or VAE_FACTOR)
    if not is_image or raw_latent.shape[1] != LATENT_CHANNELS:
        got = f"a {type(raw_latent).__name__}"
        if isinstance(raw_latent, Tensor):
            shape = [*raw_latent.shape]
            got = f"{shape[1]} channels" if is_image else f"a tensor of shape {shape}"
        raise ValueError(
            f"a FLUX.1 latent has {LATENT_CHANNELS} channels, got {got}; "
            "use Empty FLUX Latent or FLUX VAE Encode"
        )
    return raw_latent


def _empty_like(empty: Tensor, factor: float) -> Tensor:
    """Zeros [B, 16, h, w] for the image of an empty latent [B, C, h', w'], 1 / factor of its sides."""
    h, w = (max(1, round(side * factor / VAE_FACTOR)) for side in empty.shape[-2:])
    wanted = (len(empty), LATENT_CHANNELS, h, w)
    return empty if empty.shape == wanted else empty.new_zeros(wanted)


def sampled_latent_of(wire: LatentWire) -> Tensor:
    """`raw_latent_of` with even sides. Raises ValueError for odd ones."""
    raw_latent = raw_latent_of(wire)
    h, w = raw_latent.shape[-2:]
    if h % 2 or w % 2:
        width, height = w * VAE_FACTOR, h * VAE_FACTOR
        raise ValueError(
            f"the image's sides must be multiples of 16, got a latent of {width}x{height} pixels; "
            f"{sizes_near(width, height)}, for Empty FLUX Latent or to resize the image to"
        )
    return raw_latent


def with_raw_latent(wire: LatentWire, raw_latent: Tensor) -> LatentWire:
    """A copy of the LATENT with another raw latent; masks and batch indices stay."""
    kept = {key: value for key, value in wire.items() if key != "downscale_ratio_spacial"}
    return {**kept, "samples": raw_latent}


def token_count(wire: LatentWire) -> int:
    """The number of image tokens of a LATENT: one for each 2x2 patch."""
    h, w = sampled_latent_of(wire).shape[-2:]
    return (h // 2) * (w // 2)


def start_latent(raw_latent: Tensor, to_model_space: Callable[[Tensor], Tensor]) -> Tensor:
    """The latent in model space; an empty one (all zeros) stays zero there, as in ComfyUI."""
    return to_model_space(raw_latent) if torch.count_nonzero(raw_latent) else raw_latent


# SIGMAS


def checked_sigmas(sigmas: Tensor) -> Tensor:
    """Descending sigmas [steps + 1] within 0..1, float32 on the CPU; steps of length zero are left out.

    None or one of them is a split schedule with nothing left to sample. Raises ValueError for others.
    """
    sigmas = sigmas.detach().float().cpu()
    if sigmas.ndim != 1:
        raise ValueError(
            f"SIGMAS must be one row of noise levels, got a tensor of shape {[*sigmas.shape]}; "
            "use Rectified-Flow Schedule"
        )
    outside = sigmas[~((sigmas >= 0.0) & (sigmas <= 1.0))]
    if len(outside):
        raise ValueError(
            f"FLUX.1's sigmas lie between 0 and 1, got {float(outside[0]):.4g}; "
            "this schedule belongs to another kind of model, use Rectified-Flow Schedule"
        )
    sigmas = sigmas.unique_consecutive()
    if not bool((sigmas[1:] < sigmas[:-1]).all()):
        index = int((sigmas[1:] > sigmas[:-1]).nonzero()[0])
        raise ValueError(
            f"sigmas must descend, got {float(sigmas[index]):.4g} before {float(sigmas[index + 1]):.4g}; "
            "use Rectified-Flow Schedule"
        )
    return sigmas


# NOISE


@dataclass(frozen=True)
class SeededNoise:
    """A NOISE: standard normal noise of a latent's shape, drawn on the CPU from `seed` by a `convention`."""

    seed: int
    convention: str = "comfyui"

    def generate_noise(self, latent: LatentWire) -> Tensor:
        """Noise [B, 16, h, w], float32; "batch_index" lists which images of a batch the LATENT holds."""
        batch, _, h, w = raw_latent_of(latent).shape
        indices = latent.get("batch_index") or list(range(batch))
        return draw_noise(self.seed, max(indices) + 1, h, w, self.convention)[indices]


# IMAGE


def checked_image(image: Tensor) -> Tensor:
    """The IMAGE [B, H, W, 3], without alpha. Raises ValueError unless its sides are multiples of 16."""
    if image.ndim != 4 or image.shape[-1] < 3:
        raise ValueError(
            f"an image must have 3 color channels, got a tensor of shape {[*image.shape]}; convert it to RGB"
        )
    height, width = image.shape[1:3]
    if height % 16 or width % 16:
        raise ValueError(
            f"the image's sides must be multiples of 16 to be encoded, got {width}x{height}; "
            f"{sizes_near(width, height)}: resize or crop it"
        )
    return image[..., :3]


def to_core_image(image: Tensor) -> Tensor:
    """[B, 3, H, W] in -1..1 from an IMAGE [B, H, W, 3] in 0..1."""
    return rearrange(image, "b h w c -> b c h w") * 2 - 1


def channels_first(image: Tensor) -> Tensor:
    """[B, 3, H, W] from an IMAGE [B, H, W, 3 or more], its values unchanged."""
    return rearrange(image[..., :3], "b h w c -> b c h w")


def channels_last(image: Tensor) -> Tensor:
    """An IMAGE [B, H, W, 3] from [B, 3, H, W], its values unchanged."""
    return rearrange(image, "b c h w -> b h w c").cpu().contiguous()


def to_core_mask(mask: Tensor, image: Tensor) -> Tensor:
    """[B, 1, H, W] in 0..1 for an IMAGE [B, H, W, 3], from a MASK [B, h, w] of any sides."""
    return as_mask(mask, *image.shape[1:3])


def from_core_mask(mask: Tensor) -> Tensor:
    """A MASK [B, H, W], float32 on the CPU, from [B, 1, H, W]."""
    return mask.squeeze(1).float().cpu()


def from_core_image(image: Tensor) -> Tensor:
    """An IMAGE [B, H, W, 3], float32 in 0..1 on the CPU, from [B, 3, H, W] in -1..1."""
    return rearrange((image.float() / 2 + 0.5).clamp(0, 1), "b c h w -> b h w c").cpu().contiguous()


def checked_finite(tensor: Tensor, what: str, remedy: str, *modules: nn.Module) -> Tensor:
    """The tensor itself. Raises ValueError when it contains NaN or inf; `what` names it in the plural.

    The sentence names the first weight of the modules that does so too.
    """
    if not torch.isfinite(tensor).all():
        weight = not_finite_weight(*modules)
        if weight is not None:
            raise ValueError(f"{what} contain NaN or inf, as does {weight}; choose another file")
        raise ValueError(f"{what} contain NaN or inf: the weights are damaged or too large; {remedy}")
    return tensor


# All of them


@dataclass(frozen=True)
class SamplerInputs:
    """What FLUX Sampler receives; `latent` and `sigmas` are checked when it is created."""

    model: Any
    positive: Entries
    negative: Entries | None
    cfg_scale: float
    cfg_until: float
    noise: Any
    sampler: Any
    sigmas: Tensor
    latent: LatentWire

    def __post_init__(self) -> None:
        """Raises ValueError for a latent or sigmas of another model."""
        object.__setattr__(self, "latent", with_raw_latent(self.latent, sampled_latent_of(self.latent)))
        object.__setattr__(self, "sigmas", checked_sigmas(self.sigmas))

    @property
    def raw_latent(self) -> Tensor:
        """The raw latent [B, 16, h, w] to start from."""
        return self.latent["samples"]

    @property
    def noise_mask(self) -> Tensor | None:
        """The noise mask [B, H, W] of any sides; one of another batch is repeated or cut, as in ComfyUI."""
        mask = self.latent.get("noise_mask")
        if mask is None:
            return None
        mask, batch = mask.reshape(-1, *mask.shape[-2:]), len(self.raw_latent)
        return mask.repeat(-(-batch // len(mask)), 1, 1)[:batch]

    @property
    def steps(self) -> int:
        """The number of steps; 0 where a split schedule leaves nothing to sample."""
        return max(0, len(self.sigmas) - 1)

    def drawn_noise(self) -> Tensor:
        """The NOISE for the latent, of its shape. Raises ValueError where a NOISE gives another one."""
        noise = self.noise.generate_noise(self.latent)
        if noise.shape != self.raw_latent.shape:
            raise ValueError(
                f"the noise must have the latent's shape {[*self.raw_latent.shape]}, got {[*noise.shape]}; "
                "connect Noise from Seed, and a LATENT whose batch_index lists each of its images"
            )
        return noise
