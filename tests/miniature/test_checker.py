"""The checker passes correct images only: renders, near misses, blobs, halves, crowds, empty rooms."""

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
    SHAPES,
    SIZES,
    Item,
    PlacedItem,
    Scene,
    random_scene,
)

RED, BLUE = Item("circle", "red", "medium"), Item("star", "blue", "medium")
SINGLE = Scene((RED,), None, "top left", "sky", False)
PAIR = Scene((RED, BLUE), "left", None, "beige")


def renders(count: int, seed: int = 0, side: tuple[int, int] = (128, 128)) -> list[tuple[Scene, np.ndarray]]:
    rng = random.Random(seed)
    scenes = [random_scene(rng) for _ in range(count)]
    return [(scene, draw(scene, rng, *side)) for scene in scenes]


def wrong(image: np.ndarray, stated: Scene) -> list[str]:
    """The attributes that are wrong."""
    return [name for name, right in judge(parse_scene(image), stated).correct.items() if not right]


@pytest.mark.parametrize("color", COLORS)
def test_every_object_is_distinguished_on_every_background(color: str) -> None:
    """Including combinations that training never draws."""
    rng = random.Random(2)
    for shape in SHAPES:
        for background in BACKGROUNDS:
            scene = Scene((Item(shape, color, rng.choice(tuple(SIZES))),), None, "center", background)
            assert wrong(draw(scene, rng), scene) == [], scene


def test_soft_and_noisy_images_pass() -> None:
    """As a decoder leaves them: blurred by 0.7 pixels, with noise of 2 levels."""
    noise = np.random.default_rng(0)
    for scene, image in renders(40, seed=1):
        soft = Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.7))
        rough = np.asarray(soft) + noise.normal(0, 2, image.shape)
        assert wrong(rough.clip(0, 255).astype(np.uint8), scene) == [], scene


@pytest.mark.parametrize(
    ("scene", "stated", "attribute"),
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
def test_a_near_miss_fails_in_what_it_misses(scene: Scene, stated: Scene, attribute: str) -> None:
    for seed in range(6):
        assert attribute in wrong(draw(scene, random.Random(seed)), stated)
        missed = wrong(draw(scene, random.Random(seed)), stated)
        assert missed == [attribute] or attribute == "count"


def test_unspecified_attributes_may_have_any_value_of_the_world() -> None:
    for scene, image in renders(20, seed=6):
        parsed = parse_scene(image)
        verdict = judge(parsed, Scene((Item(),) * len(scene.items)))
        assert verdict.passes and set(verdict.correct) == {"count", "shape", "colour"}
        blobs = tuple(replace(found, shape=None) for found in parsed.objects)
        assert not judge(replace(parsed, objects=blobs), Scene((Item(),) * len(scene.items))).passes


def test_two_objects_may_be_stated_in_either_order() -> None:
    image = draw(PAIR, random.Random(0))
    assert wrong(image, replace(PAIR, items=(BLUE, RED), relation="right")) == []
    assert wrong(image, replace(PAIR, items=(BLUE, RED), relation="left")) == ["relation"]


def lit(cover: np.ndarray, color: tuple[int, int, int], ground: str = "gray") -> np.ndarray:
    """A image of a room with something of that cover [128, 128] and color in it."""
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
    rotated = angle + rng.uniform(0, 6.3)
    return around(rng.uniform(15, 26) / np.hypot(np.cos(rotated), ratio * np.sin(rotated)) * ratio**0.5)


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


def rotated(rng: np.random.Generator) -> np.ndarray:
    """A shape rotated so far that it is none of the others."""
    angles = {"square": 30, "triangle": 50, "diamond": 40, "star": 36, "heart": 90, "cross": 45}
    shape = str(rng.choice(list(angles)))
    angle = np.deg2rad(angles[shape])
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return polygon(64 + outline(shape) * rng.uniform(17, 26) @ rotation)


@pytest.mark.parametrize("blob", [waves, squircle, ellipse, half, merged, ring, bitten, rotated])
def test_blobs_do_not_pass_by_chance(blob: Callable[[np.random.Generator], np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    passed = 0
    for i in range(100):
        color = list(COLORS.values())[i % len(COLORS)]
        parsed = parse_scene(lit(blob(rng), color, list(BACKGROUNDS)[i % len(BACKGROUNDS)]))
        passed += judge(parsed, Scene((Item(),))).passes
    assert passed <= 1


@pytest.mark.parametrize(
    "tint", [(139, 69, 19), (0, 200, 200), (120, 120, 120), (230, 88, 40), (82, 77, 195)]
)
def test_a_wrong_tint_is_no_color(tint: tuple[int, int, int]) -> None:
    """Brown, cyan, gray; half way from red to orange and from blue to purple."""
    (found,) = parse_scene(lit(mask("star", (64.0, 64.0), 24.0, 128, 128), tint, "beige")).objects
    assert found.shape == "star" and found.color is None


def test_an_object_in_two_colors_has_none() -> None:
    image = lit(mask("circle", (64.0, 64.0), 24.0, 128, 128), COLORS["red"])
    other = lit(mask("circle", (64.0, 64.0), 24.0, 128, 128), COLORS["orange"])
    image[:, 64:] = other[:, 64:]
    (found,) = parse_scene(image).objects
    assert found.shape == "circle" and found.color is None


def test_a_background_between_two_colors_is_none() -> None:
    image = (np.array([189.0, 205.0, 238.0]) * room_light(128, 128)[..., None]).astype(np.uint8)
    assert parse_scene(image).background is None  # half way from sky to lavender


def test_a_stain_is_an_extra_object_and_a_speck_is_none() -> None:
    image = draw(SINGLE, random.Random(0))
    image[100:103, 100:103] = 0
    assert wrong(image, SINGLE) == []
    image[100:108, 100:108] = 0
    assert "count" in wrong(image, SINGLE)


def test_objects_that_touch_are_one() -> None:
    placed = [PlacedItem("circle", "red", 44.0, 64.0, 20.0), PlacedItem("circle", "blue", 80.0, 64.0, 20.0)]
    assert len(parse_scene(render(Scene(background="sky"), placed, 128, 128)).objects) == 1


@pytest.mark.parametrize("kind", ["black", "gray", "white", "noise"])
def test_an_image_of_nothing_shows_nothing_of_the_world(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    levels = {"black": 0, "gray": 128, "white": 255}
    parsed = parse_scene(np.full_like(noise, levels[kind]) if kind in levels else noise)
    assert parsed.background is None
    for count in range(1, 6):
        assert not judge(parsed, Scene((Item(),) * count)).passes


def test_an_empty_room_shows_no_object() -> None:
    parsed = parse_scene(render(Scene(background="sky"), [], 128, 128))
    assert (parsed.objects, parsed.background, parsed.shadow) == ((), "sky", False)
    missed = ("count", "shape", "colour", "size", "place")
    assert judge(parsed, SINGLE).correct == dict.fromkeys(missed, False) | {
        "background": True,
        "shadow": True,
    }
    assert judge(parsed, Scene()).passes


def test_shares_are_counted() -> None:
    """One of two right in color, both in shape: 0.5 strict; only one states a size."""
    images = [draw(SINGLE, random.Random(seed)) for seed in range(2)]
    stated = [Scene((RED,)), Scene((Item("circle", "blue"),))]
    assert score(images, stated) == {"strict": 0.5, "count": 1.0, "shape": 1.0, "colour": 0.5, "size": 1.0}


def test_a_render_is_as_sharp_as_a_render_and_a_blurred_one_is_not() -> None:
    for scene, image in renders(10, seed=7):
        assert sharpness(image, parse_scene(image)) == pytest.approx(1.0, abs=0.07)
        soft = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1.0)))
        value = sharpness(soft, parse_scene(image))
        assert value is not None and 0.55 < value < 0.7, scene


def test_without_known_objects_there_is_no_sharpness() -> None:
    blob = lit(squircle(np.random.default_rng(0)), COLORS["red"])
    assert sharpness(blob, parse_scene(blob)) is None
    empty = render(Scene(background="sky"), [], 128, 128)
    assert sharpness(empty, parse_scene(empty)) is None
