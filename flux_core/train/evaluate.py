"""Scores of a miniature: pictures of random captions, judged by the checker."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..conditioning import TextEncoders
from ..pipeline import draw_noise, sample
from ..schedule import make_sigmas
from ..solver import SOLVERS
from ..transformer import FluxTransformer
from ..vae import to_vae_space
from .autoencoder import to_pictures
from .checker import score
from .scenes import Scene, caption


@torch.no_grad()
def draw_captions(
    transformer: FluxTransformer,
    encoders: TextEncoders,
    decode: Callable[[Tensor], Tensor],
    captions: list[str],
    *,
    steps: int = 20,
    cfg_scale: float = 3.0,
    seed: int = 0,
    batch: int = 16,
    side: int = 128,
) -> list[np.ndarray]:
    """A picture uint8 [side, side, 3] of each caption. `decode` turns raw latents into images in -1..1."""
    h = side // 8
    sigmas = make_sigmas(steps, (side // 16) ** 2)
    pictures: list[np.ndarray] = []
    for start in range(0, len(captions), batch):
        part = captions[start : start + batch]
        positive = encoders.encode(part)
        negative = encoders.encode([""] * len(part))
        noise = draw_noise(seed + start, len(part), h, h)
        latent = sample(
            transformer,
            positive,
            negative,
            cfg_scale,
            noise,
            torch.zeros_like(noise),
            sigmas,
            SOLVERS["euler"],
        )
        pictures += list(to_pictures(decode(to_vae_space(latent))))
    return pictures


def evaluate(
    transformer: FluxTransformer,
    encoders: TextEncoders,
    decode: Callable[[Tensor], Tensor],
    count: int,
    *,
    steps: int = 20,
    cfg_scale: float = 3.0,
    seed: int = 1_000_000,
    keep: float = 1.0,
) -> tuple[dict[str, float], list[np.ndarray]]:
    """(shares of pictures right, the pictures) of `count` random captions.

    They tell shape and colour, and each other attribute with probability `keep`. The shares are by attribute,
    and "strict" for all attributes at once (checker.score).
    """
    rng = random.Random(seed)
    scenes = [Scene.random(rng) for _ in range(count)]
    if keep < 1.0:
        scenes = [scene.told(rng, keep) for scene in scenes]
    captions = [caption(scene, rng) for scene in scenes]
    pictures = draw_captions(
        transformer, encoders, decode, captions, steps=steps, cfg_scale=cfg_scale, seed=seed
    )
    return score(pictures, scenes), pictures
