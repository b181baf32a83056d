"""Judging images: does an image show every stated attribute of a scene, and nothing else?

`parse_scene` measures an image without knowing the prompt; `judge` compares. It is strict: all stated
attributes must be correct at once, and unspecified ones must have some value of the toy world.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .draw import render
from .scene import COUNTED, OFFSET, PLACES, RELATIONS, SIZES, Item, PlacedItem, Scene
from .scene_parser import DetectedObject, ParsedScene, parse_scene
from .shape_fit import distance_map

ATTRIBUTES = ("count", "shape", "colour", "size", "place", "relation", "background", "shadow", "without")
"""What a verdict may contain, under the names that prompt files have (benchmarks/prompts.py)."""
SIZE_SLACK = 0.10
"""Largest deviation of a radius from that of the stated size, as a fraction of it."""
PLACE_SLACK = 0.4 * OFFSET
"""Largest deviation of a center from its place, as a fraction of each side."""
MIN_DISTANCE = 0.2
"""Smallest distance of two objects along their relation, as a fraction of the shorter side."""


@dataclass(frozen=True)
class Verdict:
    """Whether each stated attribute, and the number of objects, is correct."""

    correct: dict[str, bool]

    @cached_property
    def passes(self) -> bool:
        """Whether everything is correct."""
        return all(self.correct.values())


def judge(parsed: ParsedScene, stated: Scene) -> Verdict:
    """Whether an image shows what `stated` states, and no other objects.

    `stated.shadow` True leaves shadows unspecified. Detected objects are assigned to the stated ones in the
    order that makes most attributes correct.
    """
    correct = {"count": len(parsed.objects) == len(stated.items)}
    if stated.background is not None:
        correct["background"] = parsed.background == stated.background
    if not stated.shadow:
        correct["shadow"] = not parsed.shadow
    if stated.without is not None:
        correct["without"] = stated.without not in {found.color for found in parsed.objects}
    orders = itertools.permutations(parsed.objects, len(stated.items)) if len(parsed.objects) <= 5 else ()
    compared = [_compare(parsed, found, stated) for found in orders]
    if not compared:  # no assignment: every attribute of the objects is wrong
        nothing = ParsedScene((), None, False, parsed.width, parsed.height)
        compared = [dict.fromkeys(_compare(nothing, (), stated), False)]
    return Verdict(correct | max(compared, key=lambda one: sum(one.values())))


def _compare(parsed: ParsedScene, found: tuple[DetectedObject, ...], stated: Scene) -> dict[str, bool]:
    """The stated attributes of the objects against as many detected ones in this order (or none at all).

    An unspecified shape or color must still be one of the world's.
    """
    pairs = list(zip(found, stated.items, strict=False))
    correct = {
        "shape": all(one.shape is not None and item.shape in (None, one.shape) for one, item in pairs),
        "colour": all(one.color is not None and item.color in (None, one.color) for one, item in pairs),
    }
    if any(item.size for item in stated.items):
        correct["size"] = all(_has_size(one, item, stated) for one, item in pairs)
    if stated.place is not None:
        correct["place"] = _is_at(found, stated.place)
    if stated.relation is not None:
        correct["relation"] = len(found) == 2 and _has_relation(parsed, found, stated.relation)
    return correct


def _has_size(found: DetectedObject, item: Item, stated: Scene) -> bool:
    """Whether the radius is near that of the size; equal objects have their own medium size."""
    if item.size is None:
        return True
    equal = stated.kind == "count" and item.size == "medium"
    radius = COUNTED.get(len(stated.items), 0.0) if equal else SIZES[item.size]
    return abs(found.radius / radius - 1) <= SIZE_SLACK if radius else True


def _is_at(found: tuple[DetectedObject, ...], place: str) -> bool:
    """Whether the middle of the objects is near the place."""
    if not found:
        return False
    dx, dy = PLACES[place]
    x = sum(one.x for one in found) / len(found)
    y = sum(one.y for one in found) / len(found)
    return max(abs(x - 0.5 - OFFSET * dx), abs(y - 0.5 - OFFSET * dy)) <= PLACE_SLACK


def _has_relation(parsed: ParsedScene, found: tuple[DetectedObject, ...], relation: str) -> bool:
    """Whether the first is clearly in this relation to the second, more so than in the other direction."""
    dx, dy = RELATIONS[relation]
    x = (found[0].x - found[1].x) * parsed.width
    y = (found[0].y - found[1].y) * parsed.height
    along, across = (x * dx, y) if dx else (y * dy, x)
    return along > MIN_DISTANCE * min(parsed.width, parsed.height) and along > 1.5 * abs(across)


def score(images: list[np.ndarray], stated: list[Scene]) -> dict[str, float]:
    """Share of images correct in each attribute, among those that state it, and in all ("strict")."""
    verdicts = [judge(parse_scene(image), scene) for image, scene in zip(images, stated, strict=True)]
    result = {"strict": float(np.mean([verdict.passes for verdict in verdicts]))}
    for name in ATTRIBUTES:
        correct = [verdict.correct[name] for verdict in verdicts if name in verdict.correct]
        if correct:
            result[name] = float(np.mean(correct))
    return result


def sharpness(image: np.ndarray, parsed: ParsedScene) -> float | None:
    """Sharpness of the objects' edges: 1.0 as in a render of the same objects, less where they are blurred.

    It is the energy of the image's gradient within three pixels of the outlines, relative to that of a render
    of the parsed scene. None without objects, or with one whose shape or color is none of the world's.
    """
    known = [one for one in parsed.objects if one.shape is not None and one.color is not None]
    if not known or len(known) < len(parsed.objects) or parsed.background is None:
        return None
    height, width = image.shape[:2]
    side = min(width, height)
    placed = [
        PlacedItem(str(one.shape), str(one.color), one.x * width, one.y * height, one.radius * side)
        for one in known
    ]
    reference = render(Scene(background=parsed.background, shadow=parsed.shadow), placed, width, height)
    distance = np.min(
        [np.abs(distance_map(p.shape, p.x, p.y, p.radius, (height, width))) for p in placed], axis=0
    )
    near = distance < 3
    return _edge_energy(image, near) / _edge_energy(reference, near)


def _edge_energy(image: np.ndarray, where: np.ndarray) -> float:
    """Sum over the marked pixels [H, W] of the squared gradient, after a Gaussian blur of 0.6 pixels.

    Without the blur an edge between two pixels would have twice the energy of one through a pixel.
    """
    from scipy import ndimage

    levels = ndimage.gaussian_filter(image.astype(np.float32), (0.6, 0.6, 0))
    down, across = np.gradient(levels, axis=(0, 1))
    return float(((across**2 + down**2).sum(-1))[where].sum())
