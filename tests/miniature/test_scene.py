"""Scenes: held-out combinations never occur, captions state what is not a default, objects do not overlap."""

from __future__ import annotations

import random

import numpy as np
import pytest
from rectiflux.miniature.draw import outline
from rectiflux.miniature.scene import (
    APART,
    BACKGROUNDS,
    COLORS,
    HELD_OUT_COUNTS,
    HELD_OUT_PAIRS,
    JITTER,
    OFFSET,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Item,
    PlacedItem,
    Scene,
    layout,
    random_scene,
    with_stated_attributes,
)

SIDES = [(128, 128), (160, 112), (112, 160), (192, 192), (256, 256)]


def scenes(count: int, seed: int = 0, kind: str | None = None) -> list[Scene]:
    rng = random.Random(seed)
    return [random_scene(rng, kind) for _ in range(count)]


def test_held_out_combinations_never_occur() -> None:
    for scene in scenes(4000):
        assert not {(item.shape, item.color) for item in scene.items} & HELD_OUT_PAIRS
        if len(set(scene.items)) == 1 and len(scene.items) > 1:
            assert (len(scene.items), scene.items[0].shape) not in HELD_OUT_COUNTS


def test_all_the_rest_occurs() -> None:
    found = scenes(4000)
    items = [item for scene in found for item in scene.items]
    assert {(item.shape, item.color) for item in items} | HELD_OUT_PAIRS == {
        (shape, color) for shape in SHAPES for color in COLORS
    }
    counts = {(len(scene.items), scene.items[0].shape) for scene in found if scene.kind == "count"}
    assert counts | HELD_OUT_COUNTS == {(count, shape) for count in (2, 3, 4) for shape in SHAPES}
    assert {item.size for item in items} == set(SIZES)
    assert {scene.place for scene in found} == {None, *PLACES}
    assert {scene.relation for scene in found} == {None, *RELATIONS}
    assert {scene.background for scene in found} == set(BACKGROUNDS)
    assert {scene.shadow for scene in found} == {True, False}


def test_a_scenes_kind() -> None:
    star = Item("star", "red")
    kinds = [Scene(items).kind for items in ((), (star,), (star, Item("star", "blue")), (star, star))]
    assert kinds == ["empty", "single", "pair", "count"]
    for kind in ("single", "pair", "count"):
        assert {scene.kind for scene in scenes(50, kind=kind)} == {kind}
    with pytest.raises(ValueError, match="must be single, pair or count, got 'crowd'"):
        random_scene(random.Random(0), "crowd")


def test_captions_tell_all_that_departs_from_a_default_and_nothing_false() -> None:
    rng = random.Random(1)
    for scene in scenes(2000, seed=1):
        said = with_stated_attributes(scene, rng)
        assert len(said.items) == len(scene.items) and said.shadow == scene.shadow
        for item, true in zip(said.items, scene.items, strict=True):
            assert item.shape == true.shape
            assert item.color in (None, true.color)
            assert item.size == (None if true.size == "medium" else true.size)
        assert said.relation in ((None, "left") if scene.relation == "left" else (scene.relation,))
        assert said.place in ((None, "center") if scene.place == "center" else (scene.place,))
        assert said.background in (None, scene.background)
        assert said.without not in {item.color for item in scene.items}
        if said.without:
            assert {item.color for item in said.items} == {None}


def corners(placed: PlacedItem) -> np.ndarray:
    """Points [n, 2] all along an object's outline."""
    points = outline(placed.shape) * placed.radius + (placed.x, placed.y)
    steps = np.linspace(0, 1, 4 if len(points) > 20 else 12, endpoint=False)[:, None, None]
    return (points + steps * (np.roll(points, -1, axis=0) - points)).reshape(-1, 2)


@pytest.mark.parametrize(("width", "height"), SIDES)
@pytest.mark.parametrize("kind", ["single", "pair", "count"])
def test_objects_are_inside_the_image_and_apart(width: int, height: int, kind: str) -> None:
    """In pixels of 128: inside by 2 and apart by 8. The larger of two may touch the image's edge: 1.2 radii
    from the middle of a diamond, 0.518 of the side from the image's, it may even lose 2.4 of its tip."""
    rng, side = random.Random(3), min(width, height)
    widest = APART + JITTER + 1.2 * 1.05 * SIZES["large"] - 0.5
    inside, apart = (-128 * widest, 1.0) if kind == "pair" else (2.0, 8.0)
    for scene in scenes(120, seed=3, kind=kind):
        outlines = [corners(placed) for placed in layout(scene, rng, width, height)]
        for i, points in enumerate(outlines):
            assert points.min() > inside * side / 128, scene
            assert (points < np.array([width, height]) - inside * side / 128).all(), scene
            for others in outlines[:i]:
                gap = np.linalg.norm(points[:, None] - others[None], axis=-1).min()
                assert gap > apart * side / 128, scene


@pytest.mark.parametrize(("width", "height"), SIDES)
def test_objects_are_at_their_stated_place(width: int, height: int) -> None:
    rng, side = random.Random(4), min(width, height)
    slack = JITTER * side * np.array([1, 1]) + 1e-9
    for place, direction in PLACES.items():
        scene = Scene((Item("star", "red", "small"),), None, place, "sky")
        (placed,) = layout(scene, rng, width, height)
        center = np.array([width, height]) * (0.5 + OFFSET * np.array(direction))
        assert (np.abs((placed.x, placed.y) - center) <= slack).all()
        assert placed.radius == pytest.approx(SIZES["small"] * side, rel=0.05 + 1e-9)
    for relation, direction in RELATIONS.items():
        scene = Scene((Item("star", "red", "small"), Item("star", "blue", "large")), relation, None, "sky")
        first, second = layout(scene, rng, width, height)
        along = np.dot(direction, (first.x - second.x, first.y - second.y))
        far = 2 * APART * np.abs(np.dot(direction, (width, height)))
        assert along == pytest.approx(far, abs=2 * JITTER * side + 1e-9)


@pytest.mark.parametrize(
    "scene",
    [
        Scene((Item("star"),), None, "center", "sky"),
        Scene((Item("star", "red", "small"),), None, None, "sky"),
        Scene((Item("star", "red", "small"), Item("star", "blue", "small")), None, None, "sky"),
        Scene((Item("star", "red", "small"),), None, "center"),
    ],
)
def test_a_layout_needs_every_attribute(scene: Scene) -> None:
    with pytest.raises(ValueError, match="every attribute"):
        layout(scene, random.Random(0), 128, 128)
