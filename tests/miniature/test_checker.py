"""The checker passes what is right and nothing else: renders, near misses, blobs, halves, crowds, nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter
from rectiflux.miniature.checker import judge, parse_scene, score, sharpness
from rectiflux.miniature.draw import draw, mask, outline, render, room_light
from rectiflux.miniature.scene import (
    BACKGROUNDS,
    COLORS,
    PLACES,
    SHAPES,
    SIZES,
    Item,
    PlacedItem,
    Scene,
    random_scene,
)

SIDES = [(128, 128), (160, 112), (112, 160), (192, 192), (256, 256)]
RED, BLUE = Item("circle", "red", "medium"), Item("star", "blue", "medium")
SINGLE = Scene((RED,), None, "top left", "sky", False)
PAIR = Scene((RED, BLUE), "left", None, "beige")


def renders(count: int, seed: int = 0, side: tuple[int, int] = (128, 128)) -> list[tuple[Scene, np.ndarray]]:
    rng = random.Random(seed)
    scenes = [random_scene(rng) for _ in range(count)]
    return [(scene, draw(scene, rng, *side)) for scene in scenes]


def wrong(picture: np.ndarray, told: Scene) -> list[str]:
    """What the picture shows otherwise than told."""
    return [name for name, right in judge(parse_scene(picture), told).correct.items() if not right]


@pytest.mark.parametrize("side", SIDES)
def test_true_renders_pass(side: tuple[int, int]) -> None:
    for scene, picture in renders(25, side=side):
        assert wrong(picture, scene) == [], scene
        assert parse_scene(picture).shadow == scene.shadow


@pytest.mark.parametrize("color", COLORS)
def test_every_object_is_told_from_every_other_on_every_ground(color: str) -> None:
    """Those that training never shows, too."""
    rng = random.Random(2)
    for shape in SHAPES:
        for background in BACKGROUNDS:
            scene = Scene((Item(shape, color, rng.choice(tuple(SIZES))),), None, "center", background)
            assert wrong(draw(scene, rng), scene) == [], scene


def test_soft_and_noisy_pictures_pass() -> None:
    """As a decoder leaves them: blurred by 0.7 pixels, with noise of 2 levels."""
    noise = np.random.default_rng(0)
    for scene, picture in renders(40, seed=1):
        soft = Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.7))
        rough = np.asarray(soft) + noise.normal(0, 2, picture.shape)
        assert wrong(rough.clip(0, 255).astype(np.uint8), scene) == [], scene


@pytest.mark.parametrize(
    ("scene", "told", "attribute"),
    [
        (SINGLE, replace(SINGLE, items=(replace(RED, shape="square"),)), "shape"),
        (SINGLE, replace(SINGLE, items=(replace(RED, color="orange"),)), "colour"),
        (SINGLE, replace(SINGLE, items=(replace(RED, size="large"),)), "size"),
        (SINGLE, replace(SINGLE, items=(replace(RED, size="small"),)), "size"),
        (SINGLE, replace(SINGLE, place="top"), "place"),
        (SINGLE, replace(SINGLE, place="left"), "place"),
        (SINGLE, replace(SINGLE, background="lavender"), "background"),
        (SINGLE, replace(SINGLE, items=(Item(),), without="red"), "without"),
        (replace(SINGLE, shadow=True), SINGLE, "shadow"),
        (SINGLE, replace(SINGLE, items=(RED, RED)), "count"),
        (PAIR, replace(PAIR, relation="right"), "relation"),
        (PAIR, replace(PAIR, relation="above"), "relation"),
        (PAIR, replace(PAIR, items=(replace(RED, color="blue"), replace(BLUE, color="red"))), "colour"),
        (PAIR, replace(PAIR, items=(RED, replace(BLUE, size="small"))), "size"),
        (replace(PAIR, items=(BLUE,) * 3), replace(PAIR, items=(BLUE,) * 2, relation=None), "count"),
        (replace(PAIR, items=(BLUE,) * 3), replace(PAIR, items=(BLUE,) * 4, relation=None), "count"),
    ],
)
def test_a_near_miss_fails_in_what_it_misses(scene: Scene, told: Scene, attribute: str) -> None:
    for seed in range(6):
        assert attribute in wrong(draw(scene, random.Random(seed)), told)
        missed = wrong(draw(scene, random.Random(seed)), told)
        assert missed == [attribute] or attribute == "count"


def test_near_misses_of_random_scenes_fail() -> None:
    rng = random.Random(5)
    for scene, picture in renders(40, seed=5):
        finding = parse_scene(picture)
        first = scene.items[0]
        for name, values in (("shape", SHAPES), ("color", tuple(COLORS))):
            for value in values:
                if value != getattr(first, name):
                    changed = (replace(first, **{name: value}), *scene.items[1:])
                    assert not judge(finding, replace(scene, items=changed)).passes
        other = rng.choice([name for name in BACKGROUNDS if name != scene.background])
        assert not judge(finding, replace(scene, background=other)).passes


def test_what_is_open_is_not_judged_but_must_be_of_this_world() -> None:
    for scene, picture in renders(20, seed=6):
        finding = parse_scene(picture)
        verdict = judge(finding, Scene((Item(),) * len(scene.items)))
        assert verdict.passes and set(verdict.correct) == {"count", "shape", "colour"}
        blobs = tuple(replace(seen, shape=None) for seen in finding.objects)
        assert not judge(replace(finding, objects=blobs), Scene((Item(),) * len(scene.items))).passes


def test_two_may_be_named_in_either_order() -> None:
    picture = draw(PAIR, random.Random(0))
    assert wrong(picture, replace(PAIR, items=(BLUE, RED), relation="right")) == []
    assert wrong(picture, replace(PAIR, items=(BLUE, RED), relation="left")) == ["relation"]


def test_places_hold_on_every_shape_of_picture() -> None:
    for width, height in SIDES[:3]:
        for place in PLACES:
            picture = draw(replace(SINGLE, place=place), random.Random(0), width, height)
            found = [name for name in PLACES if not wrong(picture, replace(SINGLE, place=name))]
            assert found == [place]


def lit(cover: np.ndarray, color: tuple[int, int, int], ground: str = "gray") -> np.ndarray:
    """A picture of a room with something of that cover [128, 128] and color in it."""
    room = np.asarray(BACKGROUNDS[ground], dtype=float) * room_light(128, 128)[..., None]
    return (room + (np.asarray(color) - room) * cover[..., None] + 0.5).clip(0, 255).astype(np.uint8)


def polygon(points: np.ndarray) -> np.ndarray:
    canvas = Image.new("L", (512, 512))
    ImageDraw.Draw(canvas).polygon([(float(x) * 4, float(y) * 4) for x, y in points], fill=255)
    return np.asarray(canvas.resize((128, 128), Image.Resampling.BOX), dtype=float) / 255


def around(radii: np.ndarray) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, len(radii), endpoint=False)
    return polygon(64 + np.stack([radii * np.cos(angle), radii * np.sin(angle)], axis=1))


def waves(rng: np.random.Generator) -> np.ndarray:
    """A smooth closed curve that is about as far from any shape as blobs are."""
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    parts = (rng.normal() / k**0.5 * np.cos(k * angle + rng.uniform(0, 6.3)) for k in range(2, 7))
    return around(rng.uniform(15, 26) * (1 + rng.uniform(0.12, 0.3) * sum(parts)).clip(0.2))


def squircle(rng: np.random.Generator) -> np.ndarray:
    """Half way from a circle to a square: |x|^n + |y|^n = 1 with n about 4."""
    n, angle = rng.uniform(3.5, 4.6), np.linspace(0, 2 * np.pi, 400, endpoint=False)
    return around(rng.uniform(15, 26) / (abs(np.cos(angle)) ** n + abs(np.sin(angle)) ** n) ** (1 / n))


def ellipse(rng: np.random.Generator) -> np.ndarray:
    angle, ratio = np.linspace(0, 2 * np.pi, 200, endpoint=False), rng.uniform(1.25, 2)
    turned = angle + rng.uniform(0, 6.3)
    return around(rng.uniform(15, 26) / np.hypot(np.cos(turned), ratio * np.sin(turned)) * ratio**0.5)


def half(rng: np.random.Generator) -> np.ndarray:
    """One side of a shape; not of a diamond, whose upper half is a triangle."""
    shape = str(rng.choice([name for name in SHAPES if name != "diamond"]))
    angle, (y, x) = rng.uniform(0, 6.3), np.mgrid[0:128, 0:128] - 63.5
    side = x * np.cos(angle) + y * np.sin(angle) < rng.uniform(-3, 3)
    return mask(shape, (64.0, 64.0), rng.uniform(17, 26), 128, 128) * side


def merged(rng: np.random.Generator) -> np.ndarray:
    angle, far = rng.uniform(0, 6.3), rng.uniform(14, 28)
    other = 64 + far * np.cos(angle), 64 + far * np.sin(angle)
    first, second = (str(name) for name in rng.choice(SHAPES, 2))
    return np.maximum(mask(first, (64.0, 64.0), 18, 128, 128), mask(second, other, 18, 128, 128))


def ring(rng: np.random.Generator) -> np.ndarray:
    whole = mask(str(rng.choice(SHAPES)), (64.0, 64.0), 24, 128, 128)
    return whole * (1 - mask("circle", (64.0, 64.0), rng.uniform(9, 13), 128, 128))


def bitten(rng: np.random.Generator) -> np.ndarray:
    shape, radius = str(rng.choice(SHAPES)), rng.uniform(17, 26)
    at = 64 + outline(shape)[rng.integers(len(outline(shape)))] * radius
    bite = mask("circle", (float(at[0]), float(at[1])), 0.6 * radius, 128, 128)
    return mask(shape, (64.0, 64.0), radius, 128, 128) * (1 - bite)


def turned(rng: np.random.Generator) -> np.ndarray:
    """A shape turned as far as it takes to be none of the others."""
    angles = {"square": 30, "triangle": 50, "diamond": 40, "star": 36, "heart": 90, "cross": 45}
    shape = str(rng.choice(list(angles)))
    angle = np.deg2rad(angles[shape])
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return polygon(64 + outline(shape) * rng.uniform(17, 26) @ turn)


@pytest.mark.parametrize("blob", [waves, squircle, ellipse, half, merged, ring, bitten, turned])
def test_blobs_do_not_pass_by_luck(blob: Callable[[np.random.Generator], np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    passed = 0
    for i in range(100):
        color = list(COLORS.values())[i % len(COLORS)]
        finding = parse_scene(lit(blob(rng), color, list(BACKGROUNDS)[i % len(BACKGROUNDS)]))
        passed += judge(finding, Scene((Item(),))).passes
    assert passed <= 1


@pytest.mark.parametrize(
    "tint", [(139, 69, 19), (0, 200, 200), (120, 120, 120), (230, 88, 40), (82, 77, 195)]
)
def test_a_wrong_tint_is_no_color(tint: tuple[int, int, int]) -> None:
    """Brown, cyan, gray; half way from red to orange and from blue to purple."""
    (seen,) = parse_scene(lit(mask("star", (64.0, 64.0), 24.0, 128, 128), tint, "beige")).objects
    assert seen.shape == "star" and seen.color is None


def test_an_object_in_two_colours_has_none() -> None:
    picture = lit(mask("circle", (64.0, 64.0), 24.0, 128, 128), COLORS["red"])
    other = lit(mask("circle", (64.0, 64.0), 24.0, 128, 128), COLORS["orange"])
    picture[:, 64:] = other[:, 64:]
    (seen,) = parse_scene(picture).objects
    assert seen.shape == "circle" and seen.color is None


def test_the_ground_must_have_a_colour_of_its_own() -> None:
    picture = (np.array([189.0, 205.0, 238.0]) * room_light(128, 128)[..., None]).astype(np.uint8)
    assert parse_scene(picture).background is None  # half way from sky to lavender


def test_a_small_stain_is_an_object_too_many_and_a_speck_is_none() -> None:
    picture = draw(SINGLE, random.Random(0))
    picture[100:103, 100:103] = 0
    assert wrong(picture, SINGLE) == []
    picture[100:108, 100:108] = 0
    assert "count" in wrong(picture, SINGLE)


def test_objects_that_touch_are_one() -> None:
    placed = [PlacedItem("circle", "red", 44.0, 64.0, 20.0), PlacedItem("circle", "blue", 80.0, 64.0, 20.0)]
    assert len(parse_scene(render(Scene(background="sky"), placed, 128, 128)).objects) == 1


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_flat_picture_shows_nothing_that_is_known(level: int) -> None:
    finding = parse_scene(np.full((128, 128, 3), level, dtype=np.uint8))
    assert finding.background is None and not any(seen.shape or seen.color for seen in finding.objects)


def test_an_empty_room_shows_no_object() -> None:
    finding = parse_scene(render(Scene(background="sky"), [], 128, 128))
    assert (finding.objects, finding.background, finding.shadow) == ((), "sky", False)
    missed = ("count", "shape", "colour", "size", "place")
    assert judge(finding, SINGLE).correct == dict.fromkeys(missed, False) | {
        "background": True,
        "shadow": True,
    }
    assert judge(finding, Scene()).passes


def test_noise_passes_as_nothing() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    for count in range(1, 6):
        assert not judge(parse_scene(picture), Scene((Item(),) * count)).passes


def test_shares_are_counted() -> None:
    """One of two right in color, both in shape: 0.5 strict; only one is told a size."""
    pictures = [draw(SINGLE, random.Random(seed)) for seed in range(2)]
    told = [Scene((RED,)), Scene((Item("circle", "blue"),))]
    assert score(pictures, told) == {"strict": 0.5, "count": 1.0, "shape": 1.0, "colour": 0.5, "size": 1.0}


def test_a_render_is_as_sharp_as_a_render_and_a_blurred_one_is_not() -> None:
    for scene, picture in renders(10, seed=7):
        assert sharpness(picture, parse_scene(picture)) == pytest.approx(1.0, abs=0.07)
        soft = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1.0)))
        value = sharpness(soft, parse_scene(picture))
        assert value is not None and 0.55 < value < 0.7, scene


def test_what_is_none_of_this_world_has_no_sharpness() -> None:
    blob = lit(squircle(np.random.default_rng(0)), COLORS["red"])
    assert sharpness(blob, parse_scene(blob)) is None
    empty = render(Scene(background="sky"), [], 128, 128)
    assert sharpness(empty, parse_scene(empty)) is None
