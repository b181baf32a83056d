"""What travels between nodes, checked: LATENT, CONDITIONING, SIGMAS, NOISE, IMAGE, the same in every host.

A LATENT is a dictionary; its "samples" are a raw latent [B, 16, h, w], in the scale of the VAE. A
CONDITIONING is a list of [txt [B, L, C], {"pooled_output": [B, P], "guidance": float}]. An IMAGE is
[B, H, W, 3] in 0..1; flux_core works in [B, 3, H, W], -1..1. Values may come from nodes of any pack, and may
belong to another model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..flux_core.model.spec import Conditioning
from ..flux_core.pipeline import LATENT_CHANNELS, draw_noise

LatentWire = dict[str, Any]
"""A LATENT."""

Entries = list[Any]
"""A CONDITIONING."""

READ_KEYS = frozenset({"pooled_output", "guidance"})
"""Keys of a CONDITIONING's entry that `core_conditioning` reads."""

NEUTRAL_VALUES: dict[str, float] = {
    "strength": 1.0,
    "mask_strength": 1.0,
    "start_percent": 0.0,
    "end_percent": 1.0,
    "clip_start_percent": 0.0,
    "clip_end_percent": 1.0,
}
"""Keys of ComfyUI's entries that change nothing at these values."""

MODIFIERS = frozenset({"set_area_to_bounds", "control_apply_to_uncond", "default"})
"""Keys of ComfyUI's entries that change nothing without another key, such as an area or a ControlNet."""


# LATENT


def raw_latent_of(wire: LatentWire) -> Tensor:
    """The raw latent [B, 16, h, w] of a LATENT, h and w even. Raises ValueError for another model's."""
    raw_latent = wire["samples"]
    if raw_latent.ndim != 4 or raw_latent.shape[1] != LATENT_CHANNELS:
        shape = [*raw_latent.shape]
        got = f"{shape[1]} channels" if raw_latent.ndim == 4 else f"a tensor of shape {shape}"
        raise ValueError(
            f"a FLUX.1 latent has {LATENT_CHANNELS} channels, got {got}; "
            "use Empty FLUX Latent or FLUX VAE Encode"
        )
    h, w = raw_latent.shape[-2:]
    if h % 2 or w % 2:
        raise ValueError(
            f"the image's sides must be multiples of 16, got a latent of {w * 8}x{h * 8} pixels; "
            "use Empty FLUX Latent, or resize the image before encoding it"
        )
    return raw_latent


def with_raw_latent(wire: LatentWire, raw_latent: Tensor) -> LatentWire:
    """A copy of the LATENT with another raw latent; masks and batch indices stay."""
    return {**wire, "samples": raw_latent}


def token_count(wire: LatentWire) -> int:
    """The number of image tokens of a LATENT: one for each 2x2 patch."""
    h, w = raw_latent_of(wire).shape[-2:]
    return (h // 2) * (w // 2)


def start_latent(raw_latent: Tensor, to_model_space: Callable[[Tensor], Tensor]) -> Tensor:
    """The latent in model space; an empty one (all zeros) stays zero there, as in ComfyUI."""
    return to_model_space(raw_latent) if torch.count_nonzero(raw_latent) else raw_latent


# SIGMAS


def checked_sigmas(sigmas: Tensor) -> Tensor:
    """Descending sigmas [steps + 1] within 0..1, float32 on the CPU. Raises ValueError otherwise."""
    sigmas = sigmas.detach().float().cpu()
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(
            f"sampling needs at least one step, got {max(0, sigmas.numel() - 1)} steps; "
            "set steps to 1 or more in the schedule"
        )
    if sigmas.max() > 1.0 or sigmas.min() < 0.0:
        outside = sigmas.max() if sigmas.max() > 1.0 else sigmas.min()
        raise ValueError(
            f"FLUX.1's sigmas lie between 0 and 1, got {float(outside):.4g}; "
            "this schedule belongs to another kind of model, use Rectified-Flow Schedule"
        )
    if not bool((sigmas[1:] < sigmas[:-1]).all()):
        index = int((sigmas[1:] >= sigmas[:-1]).nonzero()[0])
        raise ValueError(
            f"sigmas must descend, got {float(sigmas[index]):.4g} before {float(sigmas[index + 1]):.4g}; "
            "use Rectified-Flow Schedule"
        )
    return sigmas


# CONDITIONING


def checked_conditioning(entries: Entries, role: str) -> Entries:
    """The CONDITIONING itself. Raises ValueError when it lacks what FLUX.1 reads; `role` names the input."""
    if not entries:
        raise ValueError(f"the {role} conditioning is empty; connect FLUX Prompt")
    for txt, extra in entries:
        if not isinstance(txt, Tensor) or extra.get("pooled_output") is None:
            raise ValueError(
                f"the {role} conditioning has no pooled CLIP vector, so it is not FLUX.1's; "
                "encode the prompt with FLUX.1's text encoders"
            )
    return entries


def core_conditioning(entries: Entries, role: str) -> Conditioning:
    """The one prompt of a CONDITIONING, as flux_core takes it.

    Raises ValueError for several prompts, and for an entry that flux_core does not support.
    """
    checked_conditioning(entries, role)
    if len(entries) > 1:
        raise ValueError(
            f"the {role} conditioning combines {len(entries)} prompts, FLUX Sampler takes one here; "
            "write them into one prompt, or run this workflow in ComfyUI"
        )
    txt, extra = entries[0]
    for key, value in extra.items():
        if not _is_read_or_neutral(key, value):
            raise ValueError(
                f"the {role} conditioning has the entry {key!r}, which FLUX Sampler does not support here; "
                "remove the node that sets it, or run this workflow in ComfyUI"
            )
    return Conditioning(txt.float(), extra["pooled_output"].float(), extra.get("guidance"))


def _is_read_or_neutral(key: str, value: Any) -> bool:
    """Whether an entry is read, or changes nothing: no value, a label, or a setting that is neutral."""
    if key in READ_KEYS or key in MODIFIERS or value is None or isinstance(value, str):
        return True
    return key in NEUTRAL_VALUES and value == NEUTRAL_VALUES[key]


def with_guidance(entries: Entries, guidance: float) -> Entries:
    """A copy of the CONDITIONING in which every entry without distilled guidance has this one."""
    return [[txt, {"guidance": guidance, **extra}] for txt, extra in entries]


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
        nearest = f"{max(16, width // 16 * 16)}x{max(16, height // 16 * 16)}"
        raise ValueError(
            f"the image's sides must be multiples of 16 to be encoded, got {width}x{height}; "
            f"resize or crop it to {nearest}"
        )
    return image[..., :3]


def to_core_image(image: Tensor) -> Tensor:
    """[B, 3, H, W] in -1..1 from an IMAGE [B, H, W, 3] in 0..1."""
    return rearrange(image, "b h w c -> b c h w") * 2 - 1


def from_core_image(image: Tensor) -> Tensor:
    """An IMAGE [B, H, W, 3], float32 in 0..1 on the CPU, from [B, 3, H, W] in -1..1."""
    return rearrange((image.float() / 2 + 0.5).clamp(0, 1), "b c h w -> b h w c").cpu().contiguous()


def checked_finite(tensor: Tensor, what: str, remedy: str) -> Tensor:
    """The tensor itself. Raises ValueError when it contains NaN or inf; `what` names it in the plural."""
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{what} contain NaN or inf: the weights are damaged or too large; {remedy}")
    return tensor


# All of them


@dataclass(frozen=True)
class SamplerInputs:
    """What FLUX Sampler receives; `raw_latent` and `sigmas` are checked when it is created."""

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
        raw_latent_of(self.latent)
        object.__setattr__(self, "sigmas", checked_sigmas(self.sigmas))

    @property
    def raw_latent(self) -> Tensor:
        """The raw latent [B, 16, h, w] to start from."""
        return raw_latent_of(self.latent)
