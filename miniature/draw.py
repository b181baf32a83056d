"""Rendering scenes: lit objects that hover above the floor of a plain room.

Wall and floor have one color and a fixed light (`room_light`), so that a checker can separate them from
objects. An object is shaded like a cushion of its outline and casts a soft shadow on the floor below it.
"""

from __future__ import annotations

import math
import random
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .scene import BACKGROUNDS, COLORS, SHAPES, PlacedItem, Scene, layout

HORIZON = 0.74
"""Where the floor begins, as a fraction of the height."""
SHADOW_LINE = 0.90
"""Where shadows lie, as a fraction of the height."""
LIGHT = (-0.55, -0.83)
"""Direction of the light source, (x, y), y downwards."""


@cache
def outline(shape: str) -> np.ndarray:
    """Corners [points, 2], y downwards, of a shape of radius 1 about the origin; areas are 1.7 to 2.9.

    Raises ValueError for an unknown shape.
    """
    if shape == "circle":
        angle = np.linspace(0, 2 * math.pi, 64, endpoint=False)
        return 0.95 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    if shape == "square":
        return 0.84 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], dtype=float)
    if shape == "triangle":
        return np.array([(0.0, -1.05), (1.1, 0.85), (-1.1, 0.85)])
    if shape == "diamond":
        return np.array([(0.0, -1.2), (0.95, 0.0), (0.0, 1.2), (-0.95, 0.0)])
    if shape == "star":
        angle = -math.pi / 2 + np.arange(10) * math.pi / 5
        radius = np.where(np.arange(10) % 2 == 0, 1.2, 0.54)
        return np.stack([radius * np.cos(angle), radius * np.sin(angle) + 0.06], axis=1)
    if shape == "heart":
        t = np.linspace(0, 2 * math.pi, 64, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([x / 15.5, -(y + 2.4) / 15.5], axis=1)
    if shape == "cross":
        a, b = 0.37, 1.05
        corner = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)]
        return np.array(corner + [(-x, -y) for x, y in corner])
    raise ValueError(f"unknown shape {shape!r}; known are {', '.join(SHAPES)}")


def mask(shape: str, center: tuple[float, float], radius: float, width: int, height: int) -> np.ndarray:
    """Coverage [height, width], float32 in 0..1, of a shape around `center` (x, y), in pixels."""
    scale = 4
    points = (outline(shape) * radius + np.asarray(center)) * scale
    canvas = Image.new("L", (width * scale, height * scale))
    ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in points], fill=255)
    return np.asarray(canvas.resize((width, height), Image.Resampling.BOX), dtype=np.float32) / 255


def _blur(cover: np.ndarray, radius: float) -> np.ndarray:
    """A Gaussian blur of a coverage [H, W]."""
    image = Image.fromarray((np.clip(cover, 0, 1) * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) / 255


@cache
def room_light(width: int, height: int) -> np.ndarray:
    """Brightness [height, width] of wall and floor without objects; about 1."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = (x + 0.5) / width, (y + 0.5) / height
    wall = 1.0 + 0.06 * np.exp(-((x - 0.35) ** 2 + (y - 0.25) ** 2) / 0.18) - 0.10 * y
    floor = 0.86 + 0.55 * (y - HORIZON)
    edge = 1 / (1 + np.exp(-(y - HORIZON) / 0.012))
    return (wall * (1 - edge) + floor * edge).astype(np.float32)


def shadow_of(placed: PlacedItem, width: int, height: int) -> tuple[float, float, float, float, float]:
    """(x, y, half width, half height, all in pixels, strength) of an object's shadow on the floor."""
    y = SHADOW_LINE * height
    low = min(1.0, max(0.0, (placed.y + placed.radius) / y))  # 1: just above the floor
    return placed.x, y, placed.radius * (1.15 - 0.3 * low), placed.radius * 0.2, 0.16 + 0.22 * low


def _render_shadows(image: np.ndarray, objects: list[PlacedItem]) -> None:
    """Darken the floor below the objects of a float32 image [H, W, 3], in place."""
    height, width = image.shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    for placed in objects:
        at_x, at_y, across, deep, strength = shadow_of(placed, width, height)
        top = int(max(0, at_y - 3 * deep))
        reach = ((x[top:] - at_x) / across) ** 2 + ((y[top:] - at_y) / deep) ** 2
        image[top:] *= (1 - strength * np.exp(-(reach**1.5) * 0.8))[..., None]


def _render_object(image: np.ndarray, placed: PlacedItem) -> None:
    """Render one object into a float32 image [H, W, 3], 0..255, in place."""
    height, width = image.shape[:2]
    reach = int(1.3 * placed.radius) + 3
    left, top = max(0, int(placed.x) - reach), max(0, int(placed.y) - reach)
    right, bottom = min(width, int(placed.x) + reach), min(height, int(placed.y) + reach)
    if right <= left or bottom <= top:
        return
    size = right - left, bottom - top
    cover = mask(placed.shape, (placed.x - left, placed.y - top), placed.radius, *size)
    cushion = _blur(cover, 0.22 * placed.radius)
    slope_y, slope_x = np.gradient(cushion)
    lit = np.clip((slope_x * -LIGHT[0] + slope_y * -LIGHT[1]) * placed.radius, -0.6, 0.6)
    y, x = np.mgrid[top:bottom, left:right].astype(np.float32)
    across = ((x - placed.x) * -LIGHT[0] + (y - placed.y) * -LIGHT[1]) / (1.4 * placed.radius)
    shade = 1.03 - 0.13 * np.clip(across, -1, 1) + 0.30 * lit
    body = np.asarray(COLORS[placed.color], dtype=np.float32) * shade[..., None]
    spot = ((x - placed.x) / placed.radius + 0.26) ** 2 + ((y - placed.y) / placed.radius + 0.32) ** 2
    body += 62 * np.exp(-spot / 0.06)[..., None]
    region = image[top:bottom, left:right]
    region += (np.clip(body, 0, 255) - region) * cover[..., None]


def draw(scene: Scene, rng: random.Random, width: int = 128, height: int = 128) -> np.ndarray:
    """Image uint8 [height, width, 3] of a scene with every attribute set, at random positions.

    Raises ValueError for a scene with an unspecified attribute.
    """
    return render(scene, layout(scene, rng, width, height), width, height)


def render(scene: Scene, objects: list[PlacedItem], width: int, height: int) -> np.ndarray:
    """Image uint8 [height, width, 3] of a scene with these objects, placed by `layout`."""
    ground = np.asarray(BACKGROUNDS[scene.background or "gray"], dtype=np.float32)
    image = ground * room_light(width, height)[..., None]
    if scene.shadow:
        _render_shadows(image, objects)
    for placed in objects:
        _render_object(image, placed)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)
