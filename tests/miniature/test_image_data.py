"""Holes and training batches of the miniatures that read images."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from rectiflux.flux_core.tools.fill import mask_channels
from rectiflux.miniature.autoencoder import new_autoencoder
from rectiflux.miniature.holes import HOLES, random_hole
from rectiflux.miniature.image_data import EdgeScenes, HoleScenes, draw_scenes


@pytest.mark.parametrize("kind", HOLES, ids=lambda kind: kind.__name__)
def test_holes_have_the_images_size_and_a_part_of_it(kind) -> None:
    rng = random.Random(0)
    (drawing,) = draw_scenes(1, rng)
    size = drawing.image.shape[:2]
    shares = [kind(size, drawing.objects, rng).mean() for _ in range(30)]
    assert kind(size, drawing.objects, rng).shape == size
    assert max(shares) > 0.1
    assert kind.__name__ == "whole" or min(shares) < 0.9


def test_holes_are_of_every_kind_and_never_empty() -> None:
    rng = random.Random(1)
    (drawing,) = draw_scenes(1, rng)
    holes = [random_hole((128, 128), drawing.objects, rng) for _ in range(60)]
    assert all(hole.dtype == np.bool_ and hole.any() for hole in holes)
    assert any(hole.all() for hole in holes) and len({hole.tobytes() for hole in holes}) > 50


@pytest.fixture(scope="module")
def vae():
    return new_autoencoder()


def test_a_batch_of_edges(vae) -> None:
    batch = EdgeScenes(vae).batch(4, random.Random(2), empty_share=0.0)
    h, w = batch.latents.shape[-2:]
    assert batch.latents.shape == (4, 16, h, w) and all(batch.captions)
    assert batch.extra is not None and batch.extra.shape == (4, 16, h, w)
    assert not torch.allclose(batch.extra, batch.latents)


def test_a_batch_of_holes(vae) -> None:
    batch = HoleScenes(vae).batch(6, random.Random(3), empty_share=1.0)
    assert batch.captions == [""] * 6
    assert batch.extra is not None and batch.extra.shape[1] == 80
    masks = batch.extra[:, 16:]
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(batch.changed, masks.amax(1, keepdim=True))
    untouched = batch.changed.expand(-1, 16, -1, -1) == 0
    assert torch.allclose(batch.extra[:, :16][untouched], batch.latents[untouched], atol=1e-3)
    assert mask_channels(torch.ones(1, 1, 16, 16)).shape == (1, 64, 2, 2)
