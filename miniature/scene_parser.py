"""Parsing images of the toy world: room, objects, their shapes and colors, and shadows, from pixels alone.

It is strict: an object has a shape only if its silhouette fits that shape's outline well, much better than
any other outline and nowhere far off, and a color only if all of its inside has that color: blobs, halves,
merged and two-colored objects have none. Soft edges and a little noise, as decoders produce them, make no
difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from .draw import HORIZON, SHADOW_LINE, room_light
from .scene import BACKGROUNDS, COLORS
from .shape_fit import Fit, distance_map, fit_outline

MAX_MEAN_DEVIATION = 0.034
"""Largest mean deviation of a silhouette's edge from its outline, as a fraction of the radius: overlaps of
0.93 for a circle, 0.85 for a star."""
MIN_MARGIN = 2.8
"""The second-best outline must miss full overlap by this many times as much as the best."""
MAX_DEVIATION = 0.10
"""Largest deviation of the edge at any point, as a fraction of the radius; 2 pixels are always allowed."""
MAX_OBJECT_DISTANCE = 40.0
"""Largest distance in RGB of an object from a color of the world, of which no two are nearer than 81."""
MAX_GROUND_DISTANCE = 17.0
"""The same for backgrounds, of which no two are nearer than 38."""
MIN_COLOR_SHARE = 0.93
"""Smallest share of an object's inside that has its color, in any light."""
HIGHLIGHT_RADIUS = 0.36
"""Radius of draw.py's highlight, as a fraction of the object's."""
MAX_OBJECTS = 8
"""Largest number of objects that are examined: more than any scene has."""
MIN_AREA = 0.0018
"""Regions up to this share of the image are ignored."""


@dataclass(frozen=True)
class DetectedObject:
    """One object, its center as fractions of the sides, its radius as a fraction of the shorter side.

    `shape` and `color` are None where they are none of the world's. The quality of the outline's fit
    (shape_fit.Fit; `max_deviation` in pixels of an image of about 128 x 128), and the share of the inside
    that has the color.
    """

    shape: str | None
    color: str | None
    x: float
    y: float
    radius: float
    fit: float = 1.0
    runner_up: float = 0.0
    mean_deviation: float = 0.0
    max_deviation: float = 0.0
    color_share: float = 1.0


@dataclass(frozen=True)
class ParsedScene:
    """Content of an image of `width` x `height` pixels; `background` is None for none of the world's."""

    objects: tuple[DetectedObject, ...]
    background: str | None
    shadow: bool
    width: int
    height: int


class Room(NamedTuple):
    """Wall and floor: their color, and for each pixel its distance from that color in RGB, in any shadow
    [H, W], and its brightness relative to it [H, W], 1 outside shadows."""

    ground: np.ndarray
    distance: np.ndarray
    brightness: np.ndarray


def parse_scene(image: np.ndarray) -> ParsedScene:
    """The content of an image uint8 [H, W, 3], objects from the largest to the smallest."""
    pixels = _downscaled(image.astype(np.float32))
    room = _room(pixels)
    labels, boxes, cover = _silhouettes(room.distance)
    objects = [_describe(pixels, cover, labels == label, box) for label, box in boxes]
    return ParsedScene(
        objects=tuple(sorted(objects, key=lambda found: -found.radius)),
        background=_nearest(room.ground, BACKGROUNDS, MAX_GROUND_DISTANCE),
        shadow=_has_shadow(room, cover),
        width=image.shape[1],
        height=image.shape[0],
    )


def _downscaled(image: np.ndarray) -> np.ndarray:
    """A large image at a size near 128 x 128, each pixel the mean of a square: as sharp, and faster."""
    height, width = image.shape[:2]
    k = max(1, min(height, width) // 112)
    if k == 1:
        return image
    whole = image[: height // k * k, : width // k * k]
    return whole.reshape(height // k, k, width // k, k, 3).mean((1, 3))


def _room(image: np.ndarray) -> Room:
    """The room behind the objects, measured at the image's border.

    A pixel belongs to the floor if some brightness of the floor's color, down to the deepest shadow, is near
    it; the wall has no shadows, and between the two the limit fades, as shadows do.
    """
    height, width = image.shape[:2]
    light = room_light(width, height)
    rim = max(2, min(width, height) // 40)
    flat = image / light[..., None]
    sides = (flat[:rim], flat[rim:, :rim], flat[rim:, -rim:])
    ground = np.median(np.concatenate([part.reshape(-1, 3) for part in sides]), axis=0)
    power = max(float(ground @ ground), 1.0)
    brightness = (flat @ ground) / power
    down = (np.arange(height) + 0.5) / height
    least = np.interp(down, (HORIZON, SHADOW_LINE - 0.03), (0.95, 0.35))[:, None]
    shade = np.clip(brightness, least, 1.05)
    square = np.einsum("hwc,hwc->hw", flat, flat) + shade * (shade - 2 * brightness) * power
    return Room(ground, np.sqrt(np.maximum(square, 0)) * light, brightness)  # |flat - shade ground|, lit


def _silhouettes(
    distance: np.ndarray,
) -> tuple[np.ndarray, list[tuple[int, tuple[slice, slice]]], np.ndarray]:
    """(labels [H, W], (label, box) of each object, coverage [H, W] in 0..1).

    A pixel's coverage is its distance from the background relative to the largest within a few pixels, which
    is that of the object at whose edge it lies.
    """
    from scipy import ndimage

    side = min(distance.shape)
    reach = 2 * max(2, round(side / 50)) + 1
    cover = distance / np.maximum(ndimage.maximum_filter(distance, reach), 1.0)
    cover[distance < 12] = 0
    labels = np.empty(distance.shape, dtype=np.int32)
    ndimage.label((cover > 0.5) & (distance > 24), output=labels)
    sizes = np.bincount(labels.ravel())
    boxes = [
        (label, box)
        for label, box in enumerate(ndimage.find_objects(labels), 1)
        if box is not None and sizes[label] > MIN_AREA * distance.size
    ]
    boxes.sort(key=lambda found: -sizes[found[0]])
    return labels, boxes[:MAX_OBJECTS], cover


def _describe(
    image: np.ndarray, cover: np.ndarray, region: np.ndarray, box: tuple[slice, slice]
) -> DetectedObject:
    """The object of one region [H, W] in its box."""
    from scipy import ndimage

    height, width = cover.shape
    top, left = (max(0, part.start - 3) for part in box)
    crop = slice(top, box[0].stop + 3), slice(left, box[1].stop + 3)
    body = np.asarray(ndimage.binary_fill_holes(region[crop]), dtype=bool)
    near = ndimage.binary_dilation(body, iterations=2)
    own = np.where(near, cover[crop], 0)
    own[np.asarray(ndimage.binary_erosion(body), dtype=bool)] = 1
    fit = fit_outline(own)
    color, color_share = _color(image[crop], body, fit)
    return DetectedObject(
        shape=fit.shape if _is_good(fit) else None,
        color=color if color_share >= MIN_COLOR_SHARE else None,
        x=(fit.x + left) / width,
        y=(fit.y + top) / height,
        radius=fit.radius / min(width, height),
        fit=fit.overlap,
        runner_up=fit.runner_up,
        mean_deviation=fit.mean_deviation,
        max_deviation=fit.max_deviation,
        color_share=color_share,
    )


def _is_good(fit: Fit) -> bool:
    """Whether the best outline fits well in itself, rather than just better than the others."""
    distinct = 1 - fit.runner_up >= MIN_MARGIN * (1 - fit.overlap)
    return (
        fit.mean_deviation <= MAX_MEAN_DEVIATION
        and distinct
        and fit.max_deviation <= max(2.0, MAX_DEVIATION * fit.radius)
    )


def _color(image: np.ndarray, body: np.ndarray, fit: Fit) -> tuple[str | None, float]:
    """(name of the color, share of the inside that has it in some light)."""
    height, width = body.shape
    distance = distance_map(fit.shape, fit.x, fit.y, fit.radius, body.shape)
    x = (np.arange(width) + 0.5 - fit.x) / fit.radius + 0.26
    y = (np.arange(height) + 0.5 - fit.y) / fit.radius + 0.32
    spot = x[None] ** 2 + y[:, None] ** 2 < HIGHLIGHT_RADIUS**2
    inside = distance < -1.5
    if not (inside & ~spot).any():
        return None, 0.0
    dull, bright = (
        image[part][:: max(1, int(part.sum()) // 200)] for part in (inside & ~spot, inside & spot)
    )
    name = _nearest(np.median(dull, axis=0), COLORS, MAX_OBJECT_DISTANCE)
    if name is None:
        return None, 0.0
    share = float((inside & spot).sum() / inside.sum())
    return name, (1 - share) * _lit(dull, name, (0,)) + share * _lit(bright, name, (0, 30, 60))


def _lit(pixels: np.ndarray, name: str, white: tuple[int, ...]) -> float:
    """Share of the pixels [N, 3] that are a color in some light, with one of these levels of white added."""
    if not len(pixels):
        return 0.0
    off = ((pixels[:, None] - _lights(name, white)) ** 2).sum(-1).min(1)
    return float((off < MAX_OBJECT_DISTANCE**2).mean())


@cache
def _lights(name: str, white: tuple[int, ...]) -> np.ndarray:
    """A color [8 * levels, 3] in dim to bright light and with white added, clipped to 255."""
    light = np.arange(0.62, 1.45, 0.11, dtype=np.float32)[:, None]
    shades = [light * np.asarray(COLORS[name], dtype=np.float32) + level for level in white]
    return np.minimum(np.concatenate(shades), 255)


def _nearest(color: np.ndarray, named: dict[str, tuple[int, int, int]], limit: float) -> str | None:
    """Name of the nearest color, None if none is within `limit`."""
    distance, name = min(
        (float(np.linalg.norm(color - np.asarray(value))), name) for name, value in named.items()
    )
    return name if distance <= limit else None


def _has_shadow(room: Room, cover: np.ndarray) -> bool:
    """Whether the floor around SHADOW_LINE is darker somewhere than at its brightest."""
    from scipy import ndimage

    height, width = cover.shape
    top = int((SHADOW_LINE - 0.09) * height)
    level = ndimage.uniform_filter(room.brightness[top:], 3)
    free = ~np.asarray(ndimage.binary_dilation(cover[top:] > 0.08, iterations=2), dtype=bool)
    if free.mean() < 0.1:
        return False
    dark = free & (level < np.quantile(level[free], 0.8) - 0.09)
    return bool(dark.sum() > 0.0012 * height * width)
