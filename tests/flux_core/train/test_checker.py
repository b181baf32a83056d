"""The checker passes what is right and nothing else: clean renders, near misses, blobs, crowds, nothing."""

from __future__ import annotations

import random
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image, ImageFilter
from rectiflux.flux_core.train.checker import inspect, score
from rectiflux.flux_core.train.scenes import ATTRIBUTES, BACKGROUNDS, COLOURS, SHAPES, Scene, draw


def renders(count: int, seed: int = 0, side: int = 128) -> tuple[list[Scene], list[np.ndarray]]:
    rng = random.Random(seed)
    scenes = [Scene.random(rng) for _ in range(count)]
    return scenes, [draw(scene, rng, side, side) for scene in scenes]


@pytest.mark.parametrize("side", [128, 192])
def test_clean_renders_pass(side: int) -> None:
    scenes, pictures = renders(40, side=side)
    assert score(pictures, scenes) == {"strict": 1.0, **dict.fromkeys(ATTRIBUTES, 1.0)}


def test_every_shape_is_told_from_every_other() -> None:
    rng = random.Random(2)
    for shape in ATTRIBUTES["shape"]:
        for size in ATTRIBUTES["size"]:
            scene = Scene(shape, "purple", size, "center", "beige")
            assert inspect(draw(scene, rng)).scene == scene


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_a_near_miss_fails_in_the_attribute_that_misses(attribute: str) -> None:
    for scene, picture in zip(*renders(12, seed=1), strict=True):
        others = [value for value in ATTRIBUTES[attribute] if value != asdict(scene)[attribute]]
        told = replace(scene, **{attribute: others[len(others) // 2]})
        found = inspect(picture)
        assert not found.passes(told)
        assert [name for name, right in found.agrees(told).items() if not right] == [attribute]


def test_what_the_caption_leaves_open_is_not_judged() -> None:
    scenes, pictures = renders(4)
    told = [Scene(scene.shape, scene.colour) for scene in scenes]
    assert score(pictures, told) == {"strict": 1.0, "shape": 1.0, "colour": 1.0}


def blob(rng: np.random.Generator, scene: Scene) -> np.ndarray:
    """A smooth random patch of the scene's colour and about its size, on its background."""
    noise = Image.fromarray(rng.integers(0, 256, (128, 128), dtype=np.uint8))
    rough = np.asarray(noise.filter(ImageFilter.GaussianBlur(6)), dtype=float)
    y, x = np.mgrid[0:128, 0:128] - 64
    bump = np.exp(-(x**2 + y**2) / 400) + 0.5 * (rough - rough.mean()) / rough.std() * 0.5
    inside = bump > 0.45
    picture = np.empty((128, 128, 3))
    picture[:] = BACKGROUNDS[str(scene.background)]
    picture[inside] = COLOURS[str(scene.colour)]
    return picture.astype(np.uint8)


def test_blobs_do_not_pass_by_luck() -> None:
    rng = np.random.default_rng(0)
    scenes, _ = renders(60, seed=3)
    found = [inspect(blob(rng, scene)) for scene in scenes]
    assert sum(f.scene.shape is not None for f in found) <= 3  # a few are nearly round
    assert not any(f.passes(replace(s, size=None, place=None)) for f, s in zip(found, scenes, strict=True))


def test_two_objects_fail() -> None:
    scene = Scene("circle", "red", "small", "top left", "sky")
    picture = draw(scene, random.Random(0))
    picture[64:, 64:] = draw(replace(scene, place="bottom right"), random.Random(0))[64:, 64:]
    assert inspect(picture).objects == 2
    assert not inspect(picture).passes(scene)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_flat_picture_shows_no_object(level: int) -> None:
    found = inspect(np.full((128, 128, 3), level, dtype=np.uint8))
    assert found.objects == 0
    assert not found.passes(Scene("circle", "red"))


def test_noise_passes_as_nothing() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    found = inspect(picture)
    assert not any(found.passes(Scene(shape, colour)) for shape in SHAPES for colour in COLOURS)


def test_shares_are_counted() -> None:
    """One of two right in colour, both in shape: 0.5 strict."""
    scenes, pictures = renders(2)
    wrong = replace(scenes[1], colour="red" if scenes[1].colour != "red" else "blue")
    found = score(pictures, [scenes[0], wrong])
    assert (found["strict"], found["colour"], found["shape"]) == (0.5, 0.5, 1.0)
