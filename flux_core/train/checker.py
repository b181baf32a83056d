"""Judging pictures of the miniature's world: what is in this picture, and does it fit the caption's scene?

The checker is strict: an object counts as a shape only when its silhouette fits that shape's outline, best of
all shapes and well enough in itself, so that a blob never passes by luck. Everything is measured: colours
against those that scenes.py paints with, place and size from the silhouette.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache

import numpy as np

from .regions import erode, fill_holes, pieces
from .scenes import ATTRIBUTES, BACKGROUNDS, COLOURS, OFFSET, PLACES, SHAPES, SIZES, Scene, mask

FIT = 0.88
"""Least overlap (intersection over union) of a silhouette with the outline it is taken for."""
COLOUR_DISTANCE = 60.0
"""Greatest distance in RGB of a colour from the one it is taken for."""


@dataclass(frozen=True)
class Finding:
    """What the checker sees: attributes (None: not recognised) and how well the outline fits, 0..1."""

    scene: Scene
    fit: float
    objects: int

    def agrees(self, told: Scene) -> dict[str, bool]:
        """For each attribute that `told` names: does the picture show it?"""
        seen = asdict(self.scene)
        return {name: seen[name] == value for name, value in asdict(told).items() if value is not None}

    def passes(self, told: Scene) -> bool:
        """One object, and every named attribute right."""
        return self.objects == 1 and all(self.agrees(told).values())


def inspect(picture: np.ndarray) -> Finding:
    """What a picture uint8 [H, W, 3] shows."""
    image = picture.astype(np.float32)
    height, width = image.shape[:2]
    ground, distance = _ground(image)
    background = _nearest(ground, BACKGROUNDS, COLOUR_DISTANCE)
    pieces = _pieces(distance > 50)
    if not pieces:
        return Finding(Scene(background=background), 0.0, 0)
    halfway = 0.5 * float(np.median(distance[pieces[0]]))
    pieces = _pieces(distance > halfway) or pieces
    colour = _nearest(_body(image, pieces[0]), COLOURS, COLOUR_DISTANCE)
    shape, fit, centre, radius = _outline(pieces[0])
    scene = Scene(
        shape=shape if fit >= FIT else None,
        colour=colour,
        size=_size(radius / min(width, height)),
        place=_place(centre[0] / width - 0.5, centre[1] / height - 0.5),
        background=background,
    )
    return Finding(scene, fit, len(pieces))


def score(pictures: list[np.ndarray], told: list[Scene]) -> dict[str, float]:
    """Share of pictures right in each attribute, and "strict": in all of them at once."""
    findings = [inspect(picture) for picture in pictures]
    result = {"strict": float(np.mean([f.passes(t) for f, t in zip(findings, told, strict=True)]))}
    for name in ATTRIBUTES:
        right = [
            f.agrees(t)[name] for f, t in zip(findings, told, strict=True) if asdict(t)[name] is not None
        ]
        if right:
            result[name] = float(np.mean(right))
    return result


def _ground(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colour of the background, freed of its light, and every pixel's distance from it.

    The background is lit from above (scenes.draw), so each row has its own brightness; shadows darken it. A
    pixel belongs to the background when some brightness of the background's colour comes near it.
    """
    height, width = image.shape[:2]
    rim = max(2, width // 32)
    border = np.concatenate([image[:, :rim], image[:, -rim:]], axis=1)
    light = 1.06 - 0.14 * (np.arange(height, dtype=np.float32) / height)
    corners = np.concatenate([image[:rim].reshape(-1, 3) / light[0], image[-rim:].reshape(-1, 3) / light[-1]])
    flat = np.concatenate([(border / light[:, None, None]).reshape(-1, 3), corners])
    ground = np.median(flat, axis=0)
    lit = ground * light[:, None, None]
    brightness = np.clip((image * lit).sum(-1) / np.maximum((lit * lit).sum(-1), 1.0), 0.62, 1.05)
    return ground, np.linalg.norm(image - brightness[..., None] * lit, axis=-1)


def _pieces(marked: np.ndarray) -> list[np.ndarray]:
    """Connected pieces, the largest first, without specks and holes."""
    return [fill_holes(piece) for piece in pieces(marked, 0.004 * marked.size)]


def _body(image: np.ndarray, silhouette: np.ndarray) -> np.ndarray:
    """Median colour of the object's inside."""
    inside = erode(silhouette, 2)
    return np.median(image[inside if inside.any() else silhouette], axis=0)


def _nearest(colour: np.ndarray, named: dict[str, tuple[int, int, int]], limit: float) -> str | None:
    """Name of the nearest colour, None when none is near."""
    distance, name = min(
        (float(np.linalg.norm(colour - np.asarray(value))), name) for name, value in named.items()
    )
    return name if distance <= limit else None


def _outline(silhouette: np.ndarray) -> tuple[str, float, tuple[float, float], float]:
    """(shape, overlap, centre (x, y), radius) of the outline that fits a silhouette [H, W] best."""
    height, width = silhouette.shape
    area = float(silhouette.sum())
    ys, xs = np.nonzero(silhouette)
    middle = (xs.mean() + 0.5, ys.mean() + 0.5)
    found = ("", 0.0, middle, 0.0)
    for shape in SHAPES:
        unit_area, unit_x, unit_y = _unit(shape)
        radius = (area / unit_area) ** 0.5
        for grow in (0.96, 1.0, 1.04):
            centre = (middle[0] - unit_x * radius, middle[1] - unit_y * radius)
            ideal = mask(shape, centre, radius * grow, width, height) > 0.5
            overlap = float((ideal & silhouette).sum() / (ideal | silhouette).sum())
            if overlap > found[1]:
                found = (shape, overlap, centre, radius)
    return found


@cache
def _unit(shape: str) -> tuple[float, float, float]:
    """Area and centroid of a shape's outline at radius 1."""
    cover = mask(shape, (160.0, 160.0), 100.0, 320, 320)
    y, x = np.mgrid[0:320, 0:320] + 0.5
    total = float(cover.sum())
    return (
        total / 1e4,
        float((cover * x).sum() / total - 160) / 100,
        float((cover * y).sum() / total - 160) / 100,
    )


def _size(radius: float) -> str | None:
    """Size whose radius is within 18 % of the one measured."""
    for name, value in SIZES.items():
        if abs(radius / value - 1) <= 0.18:
            return name
    return None


def _place(x: float, y: float) -> str | None:
    """Place whose middle is within a third of a step, in parts of the sides."""
    for name, (dx, dy) in PLACES.items():
        if max(abs(x - OFFSET * dx), abs(y - OFFSET * dy)) <= OFFSET / 3:
            return name
    return None
