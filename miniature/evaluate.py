"""Sampling with a model of the miniature family: images of captions, and previews of a training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..flux_core.model.autoencoder import to_vae_space
from ..flux_core.model.spec import Conditioning, FluxSpec
from ..flux_core.model.text_encoders import TextEncoders
from ..flux_core.model.transformer import FluxTransformer
from ..flux_core.pipeline import Guidance, SampleRequest, draw_noise, latent_size, sample
from ..flux_core.sampling.schedule import make_sigmas
from ..flux_core.sampling.solver import solver_named
from ..flux_core.train.loop import Preview
from .autoencoder import to_uint8

Decode = Callable[[Tensor], Tensor]
"""Raw latents [B, 16, h, w] -> images [B, 3, H, W] in -1..1."""


@dataclass(frozen=True)
class Sampling:
    """Sampling settings: steps, guidance of one kind or none, shift of the schedule, solver.

    Classifier-free guidance of scale `cfg_scale` applies at sigmas of `cfg_until` and above.
    """

    steps: int = 28
    cfg_scale: float = 1.0
    cfg_until: float = 0.0
    guidance: float | None = None
    shift: str = "by size"
    solver: str = "euler"


FAMILY = {
    "pro": Sampling(28, cfg_scale=3.5, solver="euler_ancestral"),
    "reflow": Sampling(4, shift="none"),
    "dev": Sampling(28, guidance=3.5, solver="euler_ancestral"),
    "schnell": Sampling(4, shift="none"),
}
"""The settings that each model is meant for.

With many steps, adding noise at each lets later steps correct earlier errors: Euler draws one square in four
a pixel too wide or high, euler_ancestral one in ten.
"""


@torch.no_grad()
def generate_latents(
    transformer: FluxTransformer,
    positive: Conditioning,
    negative: Conditioning,
    sampling: Sampling,
    noise: Tensor,
) -> Tensor:
    """Latents [B, 16, h, w] in model space from noise of that shape; `negative` is for a cfg scale."""
    h, w = noise.shape[-2:]
    sigmas = make_sigmas(sampling.steps, h * w // 4, shift=sampling.shift)
    return sample(
        transformer,
        SampleRequest(
            replace(positive, guidance=sampling.guidance),
            noise,
            torch.zeros_like(noise),
            sigmas,
            solver_named(sampling.solver),
            Guidance(
                replace(negative, guidance=sampling.guidance) if sampling.cfg_scale != 1.0 else None,
                sampling.cfg_scale,
                sampling.cfg_until,
            ),
        ),
    )


@torch.no_grad()
def generate_images(
    transformer: FluxTransformer,
    encoders: TextEncoders,
    decode: Decode,
    captions: Sequence[str],
    sampling: Sampling,
    *,
    seed: int = 0,
    batch: int = 16,
    width: int = 128,
    height: int = 128,
    on_batch: Callable[[int], None] | None = None,
) -> list[np.ndarray]:
    """An image uint8 [height, width, 3] per caption, each from its own noise.

    `on_batch` is called with the number of finished images.
    """
    images: list[np.ndarray] = []
    for start in range(0, len(captions), batch):
        part = list(captions[start : start + batch])
        noise = draw_noise(seed + start, len(part), *latent_size(width, height))
        empty = encoders.encode([""] * len(part))
        latents = generate_latents(transformer, encoders.encode(part), empty, sampling, noise)
        images += list(to_uint8(decode(to_vae_space(latents))))
        if on_batch is not None:
            on_batch(len(images))
    return images


PREVIEW_PROMPTS = (
    "a red circle",
    "a small yellow star in the top left on a navy background",
    "a green heart",
    "a blue square and an orange triangle",
    "a purple diamond above a pink cross",
    "three blue stars",
    "four orange hearts on a mint background",
    "a large pink circle, without a shadow",
)
"""Prompts of a training's preview."""


def image_grid(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Images of one size in rows of `columns`; the last row is padded with gray."""
    rows = []
    for start in range(0, len(images), columns):
        row = list(images[start : start + columns])
        row += [np.full_like(images[0], 128)] * (columns - len(row))
        rows.append(np.concatenate(row, axis=1))
    return np.concatenate(rows)


def make_preview(spec: FluxSpec, encoders: TextEncoders, decode: Decode, sampling: Sampling) -> Preview:
    """A preview of a training: a grid of what its averaged weights generate for `PREVIEW_PROMPTS`."""

    def preview(weights: dict[str, Tensor]) -> np.ndarray:
        state = torch.get_rng_state()
        model = FluxTransformer(spec)
        torch.set_rng_state(state)  # initializing a model must not change the training's random state
        model.load_state_dict(weights)
        return image_grid(generate_images(model, encoders, decode, PREVIEW_PROMPTS, sampling, seed=1), 4)

    return preview
