"""Rendering: areas of outlines, exact colors of room, object and shadow."""

from __future__ import annotations

import numpy as np
import pytest
from rectiflux.miniature.draw import SHADOW_LINE, mask, outline, render, room_light, shadow_of
from rectiflux.miniature.scene import BACKGROUNDS, COLORS, SHAPES, PlacedItem, Scene


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


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_an_empty_room_is_its_color_in_the_rooms_light(background: str) -> None:
    image = render(Scene(background=background), [], 160, 112)
    light = room_light(160, 112)[..., None]
    expected = (np.array(BACKGROUNDS[background], dtype=np.float32) * light + 0.5).clip(0, 255)
    assert np.array_equal(image, expected.astype(np.uint8))


@pytest.mark.parametrize("color", COLORS)
def test_an_object_has_its_color_in_its_middle(color: str) -> None:
    """There the cushion is flat: 1.03 of the color, and 62 exp(-(0.26^2 + 0.32^2) / 0.06) of highlight."""
    placed = PlacedItem("square", color, 64.0, 64.0, 24.0)
    image = render(Scene(background="sky"), [placed], 128, 128)
    expected = 1.03 * np.array(COLORS[color]) + 62 * np.exp(-(0.26**2 + 0.32**2) / 0.06)
    assert np.abs(image[64, 64] - expected.clip(0, 255)).max() <= 1


def test_an_object_ends_at_its_outline() -> None:
    """A square reaches 0.84 radius from its middle; beyond it is the room, pixel by pixel."""
    placed = PlacedItem("square", "red", 64.0, 50.0, 25.0)
    room = render(Scene(background="sky", shadow=False), [], 128, 128)
    changed = (render(Scene(background="sky", shadow=False), [placed], 128, 128) != room).any(-1)
    ys, xs = np.nonzero(changed)
    assert (xs.min(), xs.max() + 1, ys.min(), ys.max() + 1) == pytest.approx((43, 85, 29, 71), abs=1)
    assert changed[29:71, 43:85].all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shadow_lies_below_the_object(shape: str) -> None:
    """Its middle is darker by its strength, to a level; far from it, and without one, nothing is."""
    placed = PlacedItem(shape, "green", 48.5, 50.0, 20.0)
    x, y, _, _, strength = shadow_of(placed, 128, 128)
    assert (x, y) == (48.5, SHADOW_LINE * 128) and 0.16 <= strength <= 0.38
    unshaded = render(Scene(background="beige", shadow=False), [placed], 128, 128).astype(float)
    shaded = render(Scene(background="beige"), [placed], 128, 128).astype(float)
    row = int(y)
    assert np.abs(shaded[row, 48] - (1 - strength) * unshaded[row, 48]).max() <= 1.5
    assert np.array_equal(shaded[:95], unshaded[:95]) and np.array_equal(shaded[:, 100:], unshaded[:, 100:])
    empty = render(Scene(background="beige"), [], 128, 128).astype(float)
    assert np.array_equal(unshaded[90:], empty[90:])
