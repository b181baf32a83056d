"""Kontext: reference images as tokens behind the generated ones.

A FLUX.1 Kontext model reads the packed latent of each reference beside the image that it generates; position
ids keep them apart. Any FLUX.1 model accepts such tokens, only models trained for it follow them. Sources:
black-forest-labs/flux, src/flux/sampling.py: prepare_kontext; ComfyUI 0.33, comfy/ldm/flux/model.py:
Flux._forward, for the four methods.

The references' keys and values are not kept between steps: a reference attends to the generated tokens, so
that they change with the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..model.spec import LATENT_CHANNELS, Conditioning, TokenGroup
from ..model.tokens import pack, pad_to_even
from .references import latent_ids, place_references


def with_references(
    conditioning: Conditioning,
    latents: Sequence[Tensor],
    h: int,
    w: int,
    method: str = "offset",
    strengths: Sequence[float] | None = None,
) -> Conditioning:
    """The conditioning with references behind those that it has, for a generated latent of h x w.

    `latents` [B or 1, 16, h', w'] are in model space and of any sizes; odd sides are padded as ComfyUI does.
    `method` is one of references.METHODS. `strengths`, one per reference, scale how much the other tokens
    attend to it: 1, which references without a strength have, changes nothing, 0 leaves the reference out.
    Raises ValueError for another method, for latents of another model and for too many strengths.

    Example: `with_references(prompt, [to_model_space(autoencoder.encode(image))], h, w)`.
    """
    strengths = strengths_for(len(latents), strengths)
    for latent in latents:
        if latent.ndim != 4 or latent.shape[1] != LATENT_CHANNELS:
            raise ValueError(
                f"a reference must be a latent [B, {LATENT_CHANNELS}, h, w], got {[*latent.shape]}; "
                "encode it with FLUX.1's autoencoder"
            )
    placed = place_references([latent.shape[-2:] for latent in latents], h, w, method)
    sigma = 0.0 if method == "index_timestep_zero" else None
    ids = [latent_ids(x.shape[-2], x.shape[-1], at) for x, at in zip(latents, placed, strict=True)]
    groups = [
        TokenGroup(pack(pad_to_even(latent)), at, sigma, strength)
        for latent, at, strength in zip(latents, ids, strengths, strict=True)
    ]
    return replace(conditioning, groups=(*conditioning.groups, *groups))


def strengths_for(count: int, strengths: Sequence[float] | None) -> list[float]:
    """A strength for each of `count` references: those given, then 1. Raises ValueError for more."""
    given = list(strengths or ())
    if len(given) > count:
        raise ValueError(f"each reference has one strength, got {len(given)} for {count}; remove the others")
    return [*given, *[1.0] * (count - len(given))]
