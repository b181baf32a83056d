"""Seeing the miniature's world: the room, its objects, their shapes and colours, a shadow, from pixels alone.

It is strict: an object counts as a shape only when its silhouette fits that shape's outline well in itself,
much better than any other and nowhere far off, and as a colour only when all of its inside has that colour:
a blob, a half, a merged or a two-coloured object is none. Soft edges and a little noise, as decoders leave
them, change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from .draw import HORIZON, SHADOW_LINE, room_light
from .scene import BACKGROUNDS, COLOURS
from .shape_fit import Fit, distance_map, fit_outline

WANDER = 0.034
"""Greatest deviation of a silhouette's edge from the outline it is taken for, on the average, as a part of
the radius: overlaps of 0.93 for a circle, 0.85 for a star."""
DISTINCT = 2.8
"""How many times what is missing to a full overlap must be larger with the next best outline."""
STRAY = 0.10
"""Greatest depth of a silhouette's deviation from it, as a part of the radius (and 2 pixels anyhow)."""
OBJECT_DISTANCE = 40.0
"""Greatest distance in RGB of an object's colour from the one it is taken for; two are 81 apart at least."""
GROUND_DISTANCE = 17.0
"""The same of the background, whose nearest two are 38 apart."""
PURITY = 0.93
"""Least share of an object's inside that has its colour, in whatever light."""
HIGHLIGHT = 0.36
"""Radius within which draw.py's highlight counts, as a part of the object's."""
MOST = 8
"""No more objects than that are looked at: it is too many in any case."""
SPECK = 0.0018
"""Share of the picture up to which something that is not background is overlooked."""


@dataclass(frozen=True)
class Seen:
    """One object: shape and colour (None: none that the world has), centre as parts of the sides, radius as a
    part of the shorter side. How well the outline fits (outlines.Fit; `stray` in pixels of a picture of about
    128 x 128), and the share of the inside that has the colour, `purity`.
    """

    shape: str | None
    colour: str | None
    x: float
    y: float
    radius: float
    fit: float = 1.0
    rival: float = 0.0
    wander: float = 0.0
    stray: float = 0.0
    purity: float = 1.0


@dataclass(frozen=True)
class Finding:
    """What a picture of `width` x `height` pixels shows; `background` None: none that the world has."""

    objects: tuple[Seen, ...]
    background: str | None
    shadow: bool
    width: int
    height: int


class Room(NamedTuple):
    """Wall and floor of a picture: the ground's colour; every pixel's distance in RGB from it, however deep
    the shadow on it [H, W]; its brightness against it [H, W], 1 out of shadows."""

    ground: np.ndarray
    distance: np.ndarray
    brightness: np.ndarray


def inspect(picture: np.ndarray) -> Finding:
    """What a picture uint8 [H, W, 3] shows, its objects from the largest to the smallest."""
    image = _shrunk(picture.astype(np.float32))
    height, width = image.shape[:2]
    room = _room(image)
    labels, boxes, cover = _silhouettes(room.distance)
    objects = [_look(image, cover, labels == number, box) for number, box in boxes]
    return Finding(
        objects=tuple(sorted(objects, key=lambda seen: -seen.radius)),
        background=_nearest(room.ground, BACKGROUNDS, GROUND_DISTANCE),
        shadow=_has_shadow(room, cover),
        width=picture.shape[1],
        height=picture.shape[0],
    )


def _shrunk(image: np.ndarray) -> np.ndarray:
    """A large picture at a size near 128 x 128, each pixel the mean of a square: as sharp, and quicker."""
    height, width = image.shape[:2]
    k = max(1, min(height, width) // 112)
    if k == 1:
        return image
    whole = image[: height // k * k, : width // k * k]
    return whole.reshape(height // k, k, width // k, k, 3).mean((1, 3))


def _room(image: np.ndarray) -> Room:
    """The room behind the objects, from the picture's rim.

    A pixel belongs to the floor when some brightness of the floor's colour, down to the deepest shadow, comes
    near it; the wall has no shadows, and between the two the limit fades, as shadows do.
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
    """(labels [H, W], (number, box) of each object, cover [H, W] in 0..1).

    A pixel's cover is its distance from the ground as a part of the greatest within a few pixels, which is
    that of the object whose edge it is.
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
        (number, box)
        for number, box in enumerate(ndimage.find_objects(labels), 1)
        if box is not None and sizes[number] > SPECK * distance.size
    ]
    boxes.sort(key=lambda named: -sizes[named[0]])
    return labels, boxes[:MOST], cover


def _look(image: np.ndarray, cover: np.ndarray, piece: np.ndarray, box: tuple[slice, slice]) -> Seen:
    """The object of one piece [H, W] in its box."""
    from scipy import ndimage

    height, width = cover.shape
    top, left = (max(0, part.start - 3) for part in box)
    crop = slice(top, box[0].stop + 3), slice(left, box[1].stop + 3)
    body = np.asarray(ndimage.binary_fill_holes(piece[crop]), dtype=bool)
    near = ndimage.binary_dilation(body, iterations=2)
    own = np.where(near, cover[crop], 0)
    own[np.asarray(ndimage.binary_erosion(body), dtype=bool)] = 1
    fit = fit_outline(own)
    colour, purity = _colour(image[crop], body, fit)
    return Seen(
        shape=fit.shape if _trusted(fit) else None,
        colour=colour if purity >= PURITY else None,
        x=(fit.x + left) / width,
        y=(fit.y + top) / height,
        radius=fit.radius / min(width, height),
        fit=fit.overlap,
        rival=fit.rival,
        wander=fit.wander,
        stray=fit.stray,
        purity=purity,
    )


def _trusted(fit: Fit) -> bool:
    """Whether a silhouette is the outline that fits it best, and not merely nearer to it than to others."""
    distinct = 1 - fit.rival >= DISTINCT * (1 - fit.overlap)
    return fit.wander <= WANDER and distinct and fit.stray <= max(2.0, STRAY * fit.radius)


def _colour(image: np.ndarray, body: np.ndarray, fit: Fit) -> tuple[str | None, float]:
    """(name of the colour, share of the inside that has it in some light), the highlight left out."""
    height, width = body.shape
    distance = distance_map(fit.shape, fit.x, fit.y, fit.radius, body.shape)
    x = (np.arange(width) + 0.5 - fit.x) / fit.radius + 0.26
    y = (np.arange(height) + 0.5 - fit.y) / fit.radius + 0.32
    spot = x[None] ** 2 + y[:, None] ** 2 < HIGHLIGHT**2
    inside = distance < -1.5
    if not (inside & ~spot).any():
        return None, 0.0
    dull, bright = (
        image[part][:: max(1, int(part.sum()) // 200)] for part in (inside & ~spot, inside & spot)
    )
    name = _nearest(np.median(dull, axis=0), COLOURS, OBJECT_DISTANCE)
    if name is None:
        return None, 0.0
    share = float((inside & spot).sum() / inside.sum())
    return name, (1 - share) * _lit(dull, name, (0,)) + share * _lit(bright, name, (0, 30, 60))


def _lit(pixels: np.ndarray, name: str, white: tuple[int, ...]) -> float:
    """Share of the pixels [N, 3] that are a colour in some light, with some of that much white on it."""
    if not len(pixels):
        return 0.0
    off = ((pixels[:, None] - _lights(name, white)) ** 2).sum(-1).min(1)
    return float((off < OBJECT_DISTANCE**2).mean())


@cache
def _lights(name: str, white: tuple[int, ...]) -> np.ndarray:
    """A colour [8 whites, 3] in dim to bright light and with white added, as far as a picture can show it."""
    light = np.arange(0.62, 1.45, 0.11, dtype=np.float32)[:, None]
    shades = [light * np.asarray(COLOURS[name], dtype=np.float32) + level for level in white]
    return np.minimum(np.concatenate(shades), 255)


def _nearest(colour: np.ndarray, named: dict[str, tuple[int, int, int]], limit: float) -> str | None:
    """Name of the nearest colour, None when none is near."""
    distance, name = min(
        (float(np.linalg.norm(colour - np.asarray(value))), name) for name, value in named.items()
    )
    return name if distance <= limit else None


def _has_shadow(room: Room, cover: np.ndarray) -> bool:
    """Whether the floor is darker somewhere about the line where shadows lie than at its lightest."""
    from scipy import ndimage

    height, width = cover.shape
    top = int((SHADOW_LINE - 0.09) * height)
    level = ndimage.uniform_filter(room.brightness[top:], 3)
    free = ~np.asarray(ndimage.binary_dilation(cover[top:] > 0.08, iterations=2), dtype=bool)
    if free.mean() < 0.1:
        return False
    dark = free & (level < np.quantile(level[free], 0.8) - 0.09)
    return bool(dark.sum() > 0.0012 * height * width)
