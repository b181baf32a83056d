"""The stage `kontext`: mini-dev fine-tuned to edit an image by an instruction, as FLUX.1 Kontext does.

References are tokens behind the generated ones, placed by the method "offset" (tools.kontext). Most of an
edited image is a copy of its input, so that changed places count more in the loss.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..flux_core.model.autoencoder import AutoEncoder, to_model_space, to_vae_space
from ..flux_core.model.text_encoders import TextEncoders
from ..flux_core.model.transformer import FluxTransformer
from ..flux_core.pipeline import draw_noise, latent_size
from ..flux_core.tools.kontext import with_references
from ..flux_core.train.conditional import ConditionalRecipe, ImageBatch
from ..flux_core.train.loop import device
from .autoencoder import from_uint8, to_uint8
from .edits import SIDE, Edit, random_edit
from .evaluate import Sampling, generate_latents
from .image_data import SceneData

SAMPLING = Sampling(28, guidance=3.5)
"""The settings that mini-kontext is meant for."""
CELL = 8
"""Pixels along the side of a latent's square."""
VISIBLE = 4
"""Largest difference of a place that counts as unchanged, in levels of 255: a shadow's faint end is one."""


@dataclass(frozen=True)
class KontextRecipe(ConditionalRecipe):
    """The settings of the stage: the plain velocity of edited images, changed places weighted four times."""

    lr: float = 1.5e-3
    empty_share: float = 0.0
    change_weight: float = 3.0
    guided: bool = False


class EditScenes(SceneData):
    """Random edits: the instruction, and the input image as a reference.

    The share `two_references` of batches combines two images.
    """

    def __init__(self, vae: AutoEncoder, two_references: float = 0.1) -> None:
        super().__init__(vae)
        self.two_references = two_references

    def batch(self, size: int, rng: random.Random, empty_share: float) -> ImageBatch:
        """Edited images; their changed places are those that visibly differ from the first reference."""
        kind = "two references" if rng.random() < self.two_references else None
        edits = [random_edit(rng, kind) for _ in range(size)]
        after = np.stack([edit.after.render() for edit in edits])
        inputs = reference_images(edits)
        differs = np.abs(after.astype(np.int16) - inputs[0]).max(axis=-1) > VISIBLE
        changed = nn.functional.max_pool2d(torch.from_numpy(differs).float()[:, None], CELL)
        instructions = ["" if rng.random() < empty_share else edit.instruction for edit in edits]
        references = tuple(self.encode(from_uint8(images)) for images in inputs)
        return ImageBatch(self.encode(from_uint8(after)), instructions, changed, references=references)


def reference_images(edits: Sequence[Edit]) -> list[np.ndarray]:
    """First references uint8 [B, SIDE, SIDE, 3], and second ones; all edits must have equally many."""
    columns = zip(*(edit.references for edit in edits), strict=True)
    return [np.stack([placed.render() for placed in column]) for column in columns]


@torch.no_grad()
def edit_images(
    transformer: FluxTransformer,
    encoders: TextEncoders,
    vae: AutoEncoder,
    edits: Sequence[Edit],
    sampling: Sampling = SAMPLING,
    *,
    seed: int = 0,
) -> list[np.ndarray]:
    """An image uint8 [SIDE, SIDE, 3] of each edit, in one batch; all must have equally many references.

    References are encoded by the autoencoder, as a user's image would be.
    """
    h, w = latent_size(SIDE, SIDE)
    references: list[Tensor] = [
        to_model_space(vae.encode(from_uint8(images).to(device()))) for images in reference_images(edits)
    ]
    text = with_references(encoders.encode([edit.instruction for edit in edits]), references, h, w)
    latents = generate_latents(transformer, text, text, sampling, draw_noise(seed, len(edits), h, w))
    return list(to_uint8(vae.decode(to_vae_space(latents)).cpu()))
