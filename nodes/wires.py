"""What travels between nodes, checked: LATENT, CONDITIONING, SIGMAS, NOISE, IMAGE, the same in every host.

A LATENT is a dictionary; its "samples" are raw (the autoencoder's scale), [B, 16, h, w]. A CONDITIONING is a
list of [txt [B, L, C], {"pooled_output": [B, P], "guidance": float}]. An IMAGE is [B, H, W, 3] in 0..1;
flux_core works in [B, 3, H, W], -1..1. What arrives may come from any pack, and may be another model's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..flux_core.model.spec import Conditioning
from ..flux_core.pipeline import LATENT_CHANNELS, draw_noise

Latent = dict[str, Any]
Entries = list[Any]
"""A CONDITIONING."""


def raw_samples(latent: Latent) -> Tensor:
    """The latent's samples [B, 16, h, w], h and w even. Raises ValueError for another model's latent."""
    samples = latent["samples"]
    if samples.ndim != 4 or samples.shape[1] != LATENT_CHANNELS:
        got = f"{samples.shape[1]} channels" if samples.ndim == 4 else f"a tensor of shape {[*samples.shape]}"
        raise ValueError(
            f"a FLUX.1 latent has {LATENT_CHANNELS} channels, got {got}; "
            "use Empty FLUX Latent or FLUX VAE Encode"
        )
    h, w = samples.shape[-2:]
    if h % 2 or w % 2:
        raise ValueError(
            f"the picture's sides must be multiples of 16, got a latent of {w * 8}x{h * 8} pixels; "
            "use Empty FLUX Latent, or resize the picture before encoding it"
        )
    return samples


def token_count(latent: Latent) -> int:
    """How many tokens the transformer makes of the latent: one for each 2x2 patch."""
    h, w = raw_samples(latent).shape[-2:]
    return (h // 2) * (w // 2)


def checked_finite(tensor: Tensor, what: str, remedy: str) -> Tensor:
    """The tensor itself. Raises ValueError, `what` its plural name, when there is no number in some place."""
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{what} are no finite numbers: the weights are damaged or too large; {remedy}")
    return tensor


def with_samples(latent: Latent, samples: Tensor) -> Latent:
    """A copy of the latent that carries other samples; masks and batch indices stay."""
    return {**latent, "samples": samples}


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
    """The one prompt of a CONDITIONING, as flux_core takes it. Raises ValueError for several combined."""
    checked_conditioning(entries, role)
    if len(entries) > 1:
        raise ValueError(
            f"the {role} conditioning combines {len(entries)} prompts, FLUX Sampler takes one here; "
            "write them into one prompt, or run this workflow in ComfyUI"
        )
    txt, extra = entries[0]
    return Conditioning(txt.float(), extra["pooled_output"].float(), extra.get("guidance"))


def with_guidance(entries: Entries, guidance: float | None) -> Entries:
    """A copy of the CONDITIONING in which every entry that has no distilled guidance carries this one."""
    return [[txt, {"guidance": guidance, **extra}] for txt, extra in entries]


@dataclass(frozen=True)
class SeededNoise:
    """A NOISE: standard normal noise of a latent's shape, drawn on the CPU from `seed` by a `convention`."""

    seed: int
    convention: str = "comfyui"

    def generate_noise(self, latent: Latent) -> Tensor:
        """Noise [B, 16, h, w], float32. "batch_index" says which pictures of a batch the latent holds."""
        samples = raw_samples(latent)
        batch, _, h, w = samples.shape
        chosen = latent.get("batch_index") or list(range(batch))
        return draw_noise(self.seed, max(chosen) + 1, h, w, self.convention)[chosen]


def checked_image(image: Tensor) -> Tensor:
    """The IMAGE [B, H, W, 3], without alpha. Raises ValueError unless its sides are multiples of 16."""
    if image.ndim != 4 or image.shape[-1] < 3:
        raise ValueError(f"an image must have 3 colour channels, got a tensor of shape {[*image.shape]}")
    height, width = image.shape[1:3]
    if height % 16 or width % 16:
        nearest = f"{max(16, width // 16 * 16)}x{max(16, height // 16 * 16)}"
        raise ValueError(
            f"the picture's sides must be multiples of 16 to be encoded, got {width}x{height}; "
            f"resize or crop it to {nearest}"
        )
    return image[..., :3]


def to_core_image(image: Tensor) -> Tensor:
    """[B, 3, H, W] in -1..1 from an IMAGE [B, H, W, 3] in 0..1."""
    return rearrange(image, "b h w c -> b c h w") * 2 - 1


def from_core_image(image: Tensor) -> Tensor:
    """An IMAGE [B, H, W, 3], float32 in 0..1 on the CPU, from [B, 3, H, W] in -1..1."""
    return rearrange((image.float() / 2 + 0.5).clamp(0, 1), "b c h w -> b h w c").cpu().contiguous()


def model_space_start(samples: Tensor, to_model_space: Any) -> Tensor:
    """Raw samples in model space; an empty latent (all zeros) stays zero there, as ComfyUI leaves it."""
    return to_model_space(samples) if torch.count_nonzero(samples) else samples
