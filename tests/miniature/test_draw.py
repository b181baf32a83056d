"""Painting: areas of outlines, exact colors of room, object and shadow, one seed one picture."""

from __future__ import annotations

import random

import numpy as np
import pytest
from rectiflux.miniature.draw import HORIZON, SHADOW_LINE, draw, mask, outline, render, room_light, shadow_of
from rectiflux.miniature.scene import BACKGROUNDS, COLORS, SHAPES, Item, PlacedItem, Scene

WHOLE = Scene((Item("star", "red", "large"),), None, "top left", "navy")


def polygon_area(points: np.ndarray) -> float:
    """Shoelace formula."""
    x, y = points.T
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_covers_its_outlines_area(shape: str) -> None:
    area = polygon_area(outline(shape))
    assert 1.7 < area < 2.9
    covered = mask(shape, (64.0, 60.0), 30.0, 128, 120)
    assert covered.shape == (120, 128) and covered.min() == 0 and covered.max() == 1
    assert covered.sum() == pytest.approx(area * 30**2, rel=0.02)


def test_an_unknown_shape_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown shape 'blob'; known are circle, square"):
        outline("blob")


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_an_empty_room_is_its_colour_in_the_rooms_light(background: str) -> None:
    picture = render(Scene(background=background), [], 160, 112)
    light = room_light(160, 112)[..., None]
    expected = (np.array(BACKGROUNDS[background], dtype=np.float32) * light + 0.5).clip(0, 255)
    assert np.array_equal(picture, expected.astype(np.uint8))


def test_the_room_has_a_darker_floor() -> None:
    """Far from both ends of the edge: 1 - 0.10 y and 0.86 + 0.55 (y - horizon), but for the lamp's light."""
    light = room_light(128, 128)
    assert light[127, 0] == pytest.approx(0.86 + 0.55 * (127.5 / 128 - HORIZON), abs=1e-3)
    lamp = 0.06 * np.exp(-((0.5 / 128 - 0.35) ** 2 + (0.5 / 128 - 0.25) ** 2) / 0.18)
    assert light[0, 0] == pytest.approx(1 + lamp - 0.10 * 0.5 / 128, abs=1e-3)
    assert light[int(128 * HORIZON) - 8, 5] > light[int(128 * HORIZON) + 8, 5] + 0.04


@pytest.mark.parametrize("color", COLORS)
def test_an_object_has_its_colour_in_its_middle(color: str) -> None:
    """There the cushion is flat: 1.03 of the color, and 62 exp(-(0.26^2 + 0.32^2) / 0.06) of highlight."""
    placed = PlacedItem("square", color, 64.0, 64.0, 24.0)
    picture = render(Scene(background="sky"), [placed], 128, 128)
    expected = 1.03 * np.array(COLORS[color]) + 62 * np.exp(-(0.26**2 + 0.32**2) / 0.06)
    assert np.abs(picture[64, 64] - expected.clip(0, 255)).max() <= 1


def test_an_object_ends_at_its_outline() -> None:
    """A square reaches 0.84 radius from its middle; beyond it is the room, pixel by pixel."""
    placed = PlacedItem("square", "red", 64.0, 50.0, 25.0)
    room = render(Scene(background="sky", shadow=False), [], 128, 128)
    changed = (render(Scene(background="sky", shadow=False), [placed], 128, 128) != room).any(-1)
    ys, xs = np.nonzero(changed)
    assert (xs.min(), xs.max() + 1, ys.min(), ys.max() + 1) == pytest.approx((43, 85, 29, 71), abs=1)
    assert changed[29:71, 43:85].all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shadow_lies_below_the_object_unless_there_is_none(shape: str) -> None:
    """Its middle is darker by its strength, to a level; far from it, and without one, nothing is."""
    placed = PlacedItem(shape, "green", 48.5, 50.0, 20.0)
    x, y, _, _, strength = shadow_of(placed, 128, 128)
    assert (x, y) == (48.5, SHADOW_LINE * 128) and 0.16 <= strength <= 0.38
    plain = render(Scene(background="beige", shadow=False), [placed], 128, 128).astype(float)
    shaded = render(Scene(background="beige"), [placed], 128, 128).astype(float)
    row = int(y)
    assert np.abs(shaded[row, 48] - (1 - strength) * plain[row, 48]).max() <= 1.5
    assert np.array_equal(shaded[:95], plain[:95]) and np.array_equal(shaded[:, 100:], plain[:, 100:])
    empty = render(Scene(background="beige"), [], 128, 128).astype(float)
    assert np.array_equal(plain[90:], empty[90:])


def test_a_low_object_throws_a_deeper_shadow() -> None:
    high, low = (shadow_of(PlacedItem("star", "red", 64, y, 16), 128, 128)[4] for y in (30, 95))
    assert high < low


@pytest.mark.parametrize(("width", "height"), [(128, 128), (160, 112), (112, 160)])
def test_one_seed_one_picture(width: int, height: int) -> None:
    first, again, other = (draw(WHOLE, random.Random(seed), width, height) for seed in (3, 3, 4))
    assert first.shape == (height, width, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_only_whole_scenes_can_be_drawn() -> None:
    with pytest.raises(ValueError, match="every attribute"):
        draw(Scene((Item("star", "red"),)), random.Random(0))
