"""Pictures of captions by a member of the family, and what the checker thinks of them."""

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
from .autoencoder import to_pictures

Decode = Callable[[Tensor], Tensor]
"""Raw latents [B, 16, h, w] -> images [B, 3, H, W] in -1..1."""


@dataclass(frozen=True)
class Sampling:
    """How a member of the family is used: steps, guidance of one kind or none, shift of the schedule.

    True guidance of scale `cfg_scale` counts at sigmas of `cfg_until` and above.
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
"""How each member is meant to be used.

In many steps noise that is added on the way lets later steps mend what earlier ones got wrong: where Euler
leaves one square in four a pixel too wide or high, it leaves one in ten.
"""


@torch.no_grad()
def generate_latents(
    transformer: FluxTransformer,
    positive: Conditioning,
    negative: Conditioning,
    sampling: Sampling,
    noise: Tensor,
) -> Tensor:
    """Latents [B, 16, h, w] in model space from `noise` of that shape; `negative` counts with a cfg scale."""
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
def draw_captions(
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
    """A picture uint8 [height, width, 3] of each caption, each from noise of its own.

    `on_batch` is told how many pictures are done.
    """
    pictures: list[np.ndarray] = []
    for start in range(0, len(captions), batch):
        part = list(captions[start : start + batch])
        noise = draw_noise(seed + start, len(part), *latent_size(width, height))
        empty = encoders.encode([""] * len(part))
        latents = generate_latents(transformer, encoders.encode(part), empty, sampling, noise)
        pictures += list(to_pictures(decode(to_vae_space(latents))))
        if on_batch is not None:
            on_batch(len(pictures))
    return pictures


SHOWN = (
    "a red circle",
    "a small yellow star in the top left on a navy background",
    "a green heart",
    "a blue square and an orange triangle",
    "a purple diamond above a pink cross",
    "three blue stars",
    "four orange hearts on a mint background",
    "a large pink circle, without a shadow",
)
"""Prompts of the pictures that a training shows on its way."""


def sheet(pictures: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Pictures of one size side by side in rows of `columns`; the last row is filled up with grey."""
    rows = []
    for start in range(0, len(pictures), columns):
        row = list(pictures[start : start + columns])
        row += [np.full_like(pictures[0], 128)] * (columns - len(row))
        rows.append(np.concatenate(row, axis=1))
    return np.concatenate(rows)


def shown_by(
    spec: FluxSpec, encoders: TextEncoders, decode: Decode, sampling: Sampling
) -> Callable[[dict[str, Tensor]], np.ndarray]:
    """A function from a training's averaged weights to a sheet of what they paint for `SHOWN`."""

    def picture(weights: dict[str, Tensor]) -> np.ndarray:
        state = torch.get_rng_state()
        model = FluxTransformer(spec)
        torch.set_rng_state(state)  # making a model draws numbers, which must not change the training's
        model.load_state_dict(weights)
        return sheet(draw_captions(model, encoders, decode, SHOWN, sampling, seed=1), 4)

    return picture
