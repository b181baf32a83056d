"""The miniature's world: shapes have their areas, pictures their places, captions say what they should."""

from __future__ import annotations

import random
from dataclasses import asdict

import numpy as np
import pytest
from rectiflux.flux_core.train.scenes import (
    ATTRIBUTES,
    BACKGROUNDS,
    OFFSET,
    PLACES,
    SHAPES,
    Scene,
    caption,
    draw,
    mask,
    outline,
)

WHOLE = Scene("star", "red", "large", "top left", "navy")


def polygon_area(points: np.ndarray) -> float:
    """Shoelace formula."""
    x, y = points.T
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_covers_its_outlines_area(shape: str) -> None:
    area = polygon_area(outline(shape))
    assert 1.7 < area < 2.9
    covered = mask(shape, (64.0, 60.0), 30.0, 128, 120).sum()
    assert covered == pytest.approx(area * 30**2, rel=0.02)


def test_an_unknown_shape_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown shape 'blob'; known are circle, square"):
        outline("blob")


def test_one_seed_one_picture() -> None:
    first, again, other = (draw(WHOLE, random.Random(seed)) for seed in (3, 3, 4))
    assert first.shape == (128, 128, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_only_whole_scenes_can_be_drawn() -> None:
    with pytest.raises(ValueError, match="only a scene with every attribute set can be drawn"):
        draw(Scene("star", "red"), random.Random(0))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("width", "height"), [(128, 128), (192, 96)])
def test_the_object_stands_in_its_place(place: str, width: int, height: int) -> None:
    """The centre of what is red, in parts of the sides; a picture's jitter is 0.018 of the shorter one."""
    scene = Scene("circle", "red", "small", place, "navy")
    red = draw(scene, random.Random(0), width, height).astype(float)[..., 0] > 130
    ys, xs = np.nonzero(red)
    dx, dy = PLACES[place]
    assert xs.mean() / width - 0.5 == pytest.approx(OFFSET * dx, abs=0.025)
    assert ys.mean() / height - 0.5 == pytest.approx(OFFSET * dy, abs=0.025)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_the_ground_has_its_colour(background: str) -> None:
    """Along the left rim's middle, where the light is 1.06 - 0.14 / 2."""
    picture = draw(Scene("circle", "red", "small", "right", background), random.Random(0))
    expected = np.array(BACKGROUNDS[background]) * (1.06 - 0.07)
    assert np.abs(picture[64, 2] - expected.clip(0, 255)).max() < 2


def test_captions_say_all_of_the_scene_and_no_more() -> None:
    """Every told attribute's word is there; no word of another value of an untold one is."""
    rng = random.Random(1)
    ways = set()
    for _ in range(300):
        told = Scene.random(rng).told(rng, keep=0.5)
        text = caption(told, rng)
        ways.add(text.split()[0])
        words = text.replace(",", "").replace("middle", "center").split()
        for name, value in asdict(told).items():
            if value is not None:
                assert all(part in words for part in value.split()), text
            else:
                assert not {v for v in ATTRIBUTES[name] if " " not in v} & set(words), text
        if not told.size:
            assert f"a {told.colour}" not in text or told.colour != "orange", text
    assert {"a", "an"} < ways


def test_random_scenes_cover_the_world() -> None:
    rng = random.Random(0)
    seen = {(name, value) for _ in range(400) for name, value in asdict(Scene.random(rng)).items()}
    assert seen == {(name, value) for name, values in ATTRIBUTES.items() for value in values}
