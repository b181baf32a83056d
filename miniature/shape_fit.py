"""The shape of a silhouette, by tabulated distances to the outlines that draw.py renders."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from .draw import outline
from .scene import SHAPES

REACH, CELLS = 1.6, 320
"""A table covers -REACH..REACH around a shape of radius 1, in CELLS x CELLS cells."""
SHARP = 2.0
"""Edges are compared this much sharper than they are, so that softness does not change the shape."""


@dataclass(frozen=True)
class Fit:
    """An outline fitted to a silhouette: center and radius in pixels.

    `overlap` is intersection over union, 0..1, and `runner_up` that of the second-best shape.
    `mean_deviation` is the mean distance of the silhouette's edge from the outline, as a fraction of the
    radius, and `max_deviation` the largest in pixels.
    """

    shape: str
    x: float
    y: float
    radius: float
    overlap: float
    runner_up: float
    mean_deviation: float
    max_deviation: float


@cache
def distances(shape: str) -> np.ndarray:
    """Signed distance [CELLS, CELLS], float32, from the outline of radius 1, negative inside."""
    steps = (np.arange(CELLS) + 0.5) * (2 * REACH / CELLS) - REACH
    px, py = np.meshgrid(steps, steps)
    corners = outline(shape)
    nearest = np.full(px.shape, np.inf)
    inside = np.zeros(px.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((px - ax) * ex + (py - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, np.hypot(px - ax - along * ex, py - ay - along * ey))
        if ay != by:  # a ray to the right crosses this edge: even-odd rule
            inside ^= ((ay > py) != (by > py)) & (px < ax + (py - ay) * ex / ey)
    return np.where(inside, -nearest, nearest).astype(np.float32)


@cache
def moments(shape: str) -> tuple[float, float, float]:
    """(area, x and y of the centroid) of a shape of radius 1, by the shoelace formula."""
    x, y = outline(shape).T
    after_x, after_y = np.roll(x, -1), np.roll(y, -1)
    cross = x * after_y - after_x * y
    area = cross.sum() / 2
    return (
        abs(float(area)),
        float(((x + after_x) * cross).sum() / (6 * area)),
        float(((y + after_y) * cross).sum() / (6 * area)),
    )


@cache
def perimeter(shape: str) -> float:
    """Length of the outline of a shape of radius 1."""
    corners = outline(shape)
    return float(np.linalg.norm(np.roll(corners, -1, axis=0) - corners, axis=1).sum())


def distance_map(shape: str, x: float, y: float, radius: float, size: tuple[int, int]) -> np.ndarray:
    """Signed distance [height, width] in pixels of every pixel's center from an outline, negative inside.

    `size` is (height, width). Outside the table the distance is that of its border.
    """
    scale = CELLS / (2 * REACH)
    rows, columns = (
        ((np.arange(n) + (0.5 - center + REACH * radius)) * (scale / radius)).astype(np.intp)
        for n, center in zip(size, (y, x), strict=True)
    )
    table = distances(shape).take(columns, axis=1, mode="clip").take(rows, axis=0, mode="clip")
    return table * radius


def fit_outline(cover: np.ndarray) -> Fit:
    """The outline that overlaps a silhouette best; `cover` [height, width] is 0..1, and not all 0.

    Area and centroid of the silhouette determine each shape's radius and center: where these fit badly, the
    silhouette has another shape.
    """
    area = float(cover.sum())
    middle_x = float((cover.sum(0) * (np.arange(cover.shape[1]) + 0.5)).sum()) / area
    middle_y = float((cover.sum(1) * (np.arange(cover.shape[0]) + 0.5)).sum()) / area
    cover = np.clip(0.5 + SHARP * (cover - 0.5), 0, 1)
    fits, overlaps = [], []
    for shape in SHAPES:
        unit, unit_x, unit_y = moments(shape)
        radius = (area / unit) ** 0.5
        x, y = middle_x - unit_x * radius, middle_y - unit_y * radius
        distance = distance_map(shape, x, y, radius, cover.shape)
        ideal = np.clip(0.5 - SHARP * distance, 0, 1)
        common = float(np.minimum(ideal, cover).sum())
        overlaps.append(common / (float(ideal.sum() + cover.sum()) - common))
        fits.append((shape, x, y, radius, distance))
    runner_up, best = np.argsort(overlaps)[-2:]
    shape, x, y, radius, distance = fits[best]
    wrong = (distance < 0) != (cover > 0.5)
    max_deviation = float(np.abs(distance[wrong]).max()) if wrong.any() else 0.0
    mean_deviation = (1 - overlaps[best]) * moments(shape)[0] / perimeter(shape)
    return Fit(shape, x, y, radius, overlaps[best], overlaps[runner_up], mean_deviation, max_deviation)
