"""The components that `bench fidelity` compares: the same input to ours and to the reference's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..flux_core.model.spec import Conditioning
from ..flux_core.model.transformer import FluxTransformer
from ..flux_core.pipeline import Models
from .reference.models import diffusers_velocity
from .reference.small_pipeline import GUIDANCE, PROMPT, WIDTH, References, diffusers_image, our_image

LATENT, LENGTH, SIGMA = 8, 32, 0.6
"""Sides of the latent, text tokens and sigma of the transformer's one step."""

IMAGE = "all"
"""The part of the component that all models together compute."""


@dataclass(frozen=True)
class Component:
    """A part (a model, or IMAGE), and the outputs of ours and of the references for one input."""

    part: str
    ours: Callable[[Models], Tensor]
    theirs: Callable[[References, Models], Tensor]


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def transformer_input(channels: int, guidance: bool) -> tuple[Tensor, Conditioning]:
    """Tokens of a latent, and a prompt."""
    tokens = noise(4, 1, LATENT * LATENT // 4, channels)
    return tokens, Conditioning(
        noise(5, 1, LENGTH, WIDTH), noise(6, 1, WIDTH), GUIDANCE if guidance else None
    )


def velocity(model: FluxTransformer) -> Tensor:
    tokens, prompt = transformer_input(model.spec.in_channels, model.spec.guidance_embed)
    return model(tokens, model.prepare(prompt, [SIGMA], LATENT, LATENT), SIGMA)


def their_velocity(references: References, models: Models) -> Tensor:
    config = references.transformer.config
    tokens, prompt = transformer_input(config.in_channels, config.guidance_embeds)
    return diffusers_velocity(references.transformer, tokens, prompt, SIGMA, LATENT, LATENT)


def image() -> Tensor:
    return noise(1, 1, 3, 32, 48).clamp(-1, 1)


def latent() -> Tensor:
    return noise(2, 1, 16, 4, 6)


def t5_ids(models: Models) -> Tensor:
    return models.text_encoders.t5_ids([PROMPT])


def clip_ids(models: Models) -> Tensor:
    return models.text_encoders.clip_ids([PROMPT])


COMPONENTS = {
    "transformer": Component("transformer", lambda ours: velocity(ours.transformer), their_velocity),
    "VAE encode": Component(
        "autoencoder",
        lambda ours: ours.autoencoder.encode(image()),
        lambda theirs, _: theirs.autoencoder.encode(image().to(theirs.autoencoder.dtype)).latent_dist.mean,
    ),
    "VAE decode": Component(
        "autoencoder",
        lambda ours: ours.autoencoder.decode(latent()),
        lambda theirs, _: theirs.autoencoder.decode(latent().to(theirs.autoencoder.dtype)).sample,
    ),
    "T5": Component(
        "t5",
        lambda ours: ours.text_encoders.encode_t5(t5_ids(ours)),
        lambda theirs, ours: theirs.t5(input_ids=t5_ids(ours)).last_hidden_state,
    ),
    "CLIP": Component(
        "clip",
        lambda ours: ours.text_encoders.encode_clip(clip_ids(ours)),
        lambda theirs, ours: theirs.clip(input_ids=clip_ids(ours)).pooler_output,
    ),
    "whole image": Component(
        IMAGE,
        our_image,
        lambda theirs, ours: diffusers_image(theirs, t5_ids(ours), clip_ids(ours)),
    ),
}
