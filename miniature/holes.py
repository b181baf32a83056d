"""Masks for training mini-fill: rectangles, ellipses, brush strokes, borders, objects, the whole image."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from .scene import PlacedItem

Size = tuple[int, int]
"""(height, width) in pixels."""


def random_hole(size: Size, objects: Sequence[PlacedItem], rng: random.Random) -> np.ndarray:
    """A mask bool [height, width], true in the hole, of at least one pixel."""
    while True:
        (kind,) = rng.choices(tuple(HOLES), tuple(HOLES.values()))
        hole = kind(size, objects, rng)
        if hole.any():
            return hole


def whole(size: Size, objects: Sequence[PlacedItem], rng: random.Random) -> np.ndarray:
    """Everything."""
    return np.ones(size, dtype=bool)


def border(size: Size, objects: Sequence[PlacedItem], rng: random.Random) -> np.ndarray:
    """One to three sides, as for outpainting."""
    hole = np.zeros(size, dtype=bool)
    for side in rng.sample(range(4), rng.randint(1, 3)):
        length = size[side % 2]
        deep = rng.randint(length // 8, length * 5 // 8)
        edge = slice(0, deep) if side < 2 else slice(length - deep, length)
        hole[(edge, slice(None)) if side % 2 == 0 else (slice(None), edge)] = True
    return hole


def rectangle(size: Size, objects: Sequence[PlacedItem], rng: random.Random) -> np.ndarray:
    """A rectangle of an eighth to four fifths of each side."""
    hole = np.zeros(size, dtype=bool)
    spans = []
    for length in size:
        deep = rng.randint(length // 8, length * 4 // 5)
        start = rng.randint(0, length - deep)
        spans.append(slice(start, start + deep))
    hole[tuple(spans)] = True
    return hole


def ellipse(size: Size, objects: Sequence[PlacedItem], rng: random.Random) -> np.ndarray:
    """An ellipse, perhaps cut by the image's edge."""
    y, x = np.mgrid[: size[0], : size[1]]
    center = [rng.uniform(0, length) for length in size]
    radius = [rng.uniform(0.1, 0.5) * length for length in size]
    return ((y - center[0]) / radius[0]) ** 2 + ((x - center[1]) / radius[1]) ** 2 < 1


def strokes(size: Size, objects: Sequence[PlacedItem], rng: random.Random) -> np.ndarray:
    """Up to four strokes of a round brush."""
    canvas = Image.new("1", (size[1], size[0]))
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.randint(1, 4)):
        brush = rng.randint(min(size) // 12, min(size) // 4)
        at = [rng.uniform(0, size[1]), rng.uniform(0, size[0])]
        angle = rng.uniform(0, 2 * math.pi)
        for _ in range(rng.randint(2, 8)):
            angle += rng.uniform(-0.8, 0.8)
            to = [at[0] + brush * math.cos(angle), at[1] + brush * math.sin(angle)]
            pen.line([*at, *to], fill=1, width=brush)
            pen.ellipse([to[0] - brush / 2, to[1] - brush / 2, to[0] + brush / 2, to[1] + brush / 2], fill=1)
            at = to
    return np.asarray(canvas)


def around_object(size: Size, objects: Sequence[PlacedItem], rng: random.Random) -> np.ndarray:
    """A disc or a rectangle around one object, or around all of them."""
    y, x = np.mgrid[: size[0], : size[1]]
    hole = np.zeros(size, dtype=bool)
    is_round = rng.random() < 0.5
    for placed in objects if rng.random() < 0.25 else [rng.choice(objects)]:
        reach = [placed.radius * rng.uniform(1.1, 1.9) for _ in range(2)]
        away = np.abs(y - placed.y) / reach[0], np.abs(x - placed.x) / reach[1]
        hole |= away[0] ** 2 + away[1] ** 2 < 1.7 if is_round else np.maximum(*away) < 1
    return hole


HOLES: dict[Callable[[Size, Sequence[PlacedItem], random.Random], np.ndarray], float] = {
    around_object: 0.4,
    rectangle: 0.2,
    border: 0.15,
    strokes: 0.1,
    ellipse: 0.1,
    whole: 0.05,
}
"""Kinds of holes and their shares."""
