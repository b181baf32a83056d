"""Training data of the miniatures that read an image: scenes are drawn batch by batch.

A batch has latents, captions and what the model reads beside them: edges (mini-canny) or the scene with a
hole and its mask (mini-fill). Nothing of it that is held out (scene.HELD_OUT_PAIRS) is drawn or named.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..flux_core.model.autoencoder import AutoEncoder, to_model_space
from ..flux_core.tools.control import canny
from ..flux_core.tools.fill import mask_channels, masked_image
from ..flux_core.train.conditional import ConditionalRecipe, ImageBatch
from .autoencoder import from_uint8
from .caption import caption
from .data import draw_size
from .draw import render
from .holes import random_hole
from .pca import encode_linear, linear_code
from .scene import PlacedItem, Scene, layout, random_scene, with_stated_attributes


@dataclass(frozen=True)
class EdgeRecipe(ConditionalRecipe):
    """The settings of the stage `canny`."""

    lr: float = 5e-4


@dataclass(frozen=True)
class HoleRecipe(ConditionalRecipe):
    """The settings of the stage `fill`: what is in the hole counts twice."""

    lr: float = 5e-4
    change_weight: float = 1.0


@dataclass(frozen=True)
class Drawing:
    """A scene, its objects in place, and its image uint8 [height, width, 3]."""

    scene: Scene
    objects: list[PlacedItem]
    image: np.ndarray


def draw_scenes(count: int, rng: random.Random) -> list[Drawing]:
    """Random drawings, all of one of the training's sizes."""
    width, height = draw_size(rng)
    drawings = []
    for _ in range(count):
        scene = random_scene(rng)
        objects = layout(scene, rng, width, height)
        drawings.append(Drawing(scene, objects, render(scene, objects, width, height)))
    return drawings


class SceneData:
    """What the data sets of this file share: an encoder, and captions."""

    def __init__(self, vae: AutoEncoder) -> None:
        self.code = linear_code(vae)

    def encode(self, images: Tensor) -> Tensor:
        """Latents [B, 16, h, w] in model space of images [B, 3, H, W] in -1..1."""
        return to_model_space(encode_linear(images, self.code))

    def captions(self, drawings: list[Drawing], rng: random.Random, empty_share: float) -> list[str]:
        """A caption of each, some of them empty."""
        return [
            "" if rng.random() < empty_share else caption(with_stated_attributes(drawing.scene, rng), rng)
            for drawing in drawings
        ]


def images_of(drawings: list[Drawing]) -> Tensor:
    """Images [B, 3, H, W] in -1..1."""
    return from_uint8(np.stack([drawing.image for drawing in drawings]))


class EdgeScenes(SceneData):
    """Scenes with the edges of our Canny node: they give outlines and places, the caption gives colors."""

    def batch(self, size: int, rng: random.Random, empty_share: float) -> ImageBatch:
        """The edges' latents as 16 extra channels; every element of the image counts alike."""
        drawings = draw_scenes(size, rng)
        images = images_of(drawings)
        captions = self.captions(drawings, rng, empty_share)
        latents = self.encode(images)
        return ImageBatch(
            latents, captions, torch.zeros_like(latents[:, :1]), extra=self.encode(canny(images))
        )


class HoleScenes(SceneData):
    """Scenes with a hole: the masked image's latent and the mask as 80 extra channels."""

    def batch(self, size: int, rng: random.Random, empty_share: float) -> ImageBatch:
        """Elements in the hole count as changed."""
        drawings = draw_scenes(size, rng)
        images = images_of(drawings)
        captions = self.captions(drawings, rng, empty_share)
        holes = np.stack([random_hole(drawing.image.shape[:2], drawing.objects, rng) for drawing in drawings])
        masks = torch.from_numpy(holes)[:, None].float()
        channels = mask_channels(masks)
        changed = channels.amax(dim=1, keepdim=True)
        extra = torch.cat([self.encode(masked_image(images, masks)), channels], dim=1)
        return ImageBatch(self.encode(images), captions, changed, extra=extra)
