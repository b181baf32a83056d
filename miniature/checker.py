"""Judging pictures of the miniature's world: does this picture show what was told, and nothing else?

`inspect` (sight.py) measures a picture without knowing what was asked for; `judge` compares. It is strict:
everything that was told must be right at once, and what was left open must still be of this world.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .draw import paint
from .scene import COUNTED, OFFSET, PLACES, RELATIONS, SIZES, Item, Placed, Scene
from .scene_parser import Finding, Seen, inspect
from .shape_fit import distance_map

ATTRIBUTES = ("count", "shape", "colour", "size", "place", "relation", "background", "shadow", "without")
"""What a verdict may tell."""
SIZE_SLACK = 0.10
"""Greatest deviation of a radius from that of the size it is taken for, as a part of it."""
PLACE_SLACK = 0.4 * OFFSET
"""Greatest deviation of a centre from its place, as a part of each side."""
CLEARLY = 0.2
"""Least distance of two objects along their relation, as a part of the shorter side."""


@dataclass(frozen=True)
class Verdict:
    """For each attribute that was told, and for the number of objects: does the picture show it?"""

    right: dict[str, bool]

    @cached_property
    def passes(self) -> bool:
        """Everything is right."""
        return all(self.right.values())


def judge(finding: Finding, told: Scene) -> Verdict:
    """Whether a picture shows what was told, and no other objects; what is None there is open.

    `told.shadow` True leaves a shadow open. Two unlike objects may be either of those told, whichever way is
    right in more.
    """
    right = {"count": len(finding.objects) == len(told.items)}
    if told.background is not None:
        right["background"] = finding.background == told.background
    if not told.shadow:
        right["shadow"] = not finding.shadow
    if told.without is not None:
        right["without"] = told.without not in {seen.colour for seen in finding.objects}
    orders = itertools.permutations(finding.objects, len(told.items)) if len(finding.objects) <= 5 else ()
    compared = [_compare(finding, seen, told) for seen in orders]
    if not compared:  # nothing that was told of the objects can be there
        nothing = Finding((), None, False, finding.width, finding.height)
        compared = [dict.fromkeys(_compare(nothing, (), told), False)]
    return Verdict(right | max(compared, key=lambda found: sum(found.values())))


def _compare(finding: Finding, seen: tuple[Seen, ...], told: Scene) -> dict[str, bool]:
    """What was told of the objects against as many that were seen, in this order (or none at all).

    An open shape or colour must still be one of the world's.
    """
    pairs = list(zip(seen, told.items, strict=False))
    right = {
        "shape": all(one.shape is not None and item.shape in (None, one.shape) for one, item in pairs),
        "colour": all(one.colour is not None and item.colour in (None, one.colour) for one, item in pairs),
    }
    if any(item.size for item in told.items):
        right["size"] = all(_has_size(one, item, told) for one, item in pairs)
    if told.place is not None:
        right["place"] = _stands(seen, told.place)
    if told.relation is not None:
        right["relation"] = len(seen) == 2 and _relates(finding, seen, told.relation)
    return right


def _has_size(seen: Seen, item: Item, told: Scene) -> bool:
    """Whether the radius is near that of the size; several alike have their own medium."""
    if item.size is None:
        return True
    alike = told.kind == "count" and item.size == "medium"
    radius = COUNTED.get(len(told.items), 0.0) if alike else SIZES[item.size]
    return abs(seen.radius / radius - 1) <= SIZE_SLACK if radius else True


def _stands(seen: tuple[Seen, ...], place: str) -> bool:
    """Whether the middle of the objects is near the place."""
    if not seen:
        return False
    dx, dy = PLACES[place]
    x = sum(one.x for one in seen) / len(seen)
    y = sum(one.y for one in seen) / len(seen)
    return max(abs(x - 0.5 - OFFSET * dx), abs(y - 0.5 - OFFSET * dy)) <= PLACE_SLACK


def _relates(finding: Finding, seen: tuple[Seen, ...], relation: str) -> bool:
    """Whether the first stands to the second as told, clearly, and more so than in the other direction."""
    dx, dy = RELATIONS[relation]
    x = (seen[0].x - seen[1].x) * finding.width
    y = (seen[0].y - seen[1].y) * finding.height
    along, across = (x * dx, y) if dx else (y * dy, x)
    return along > CLEARLY * min(finding.width, finding.height) and along > 1.5 * abs(across)


def score(pictures: list[np.ndarray], told: list[Scene]) -> dict[str, float]:
    """Share of pictures right in each attribute, among those told it, and "strict": in all at once."""
    verdicts = [judge(inspect(picture), scene) for picture, scene in zip(pictures, told, strict=True)]
    result = {"strict": float(np.mean([verdict.passes for verdict in verdicts]))}
    for name in ATTRIBUTES:
        right = [verdict.right[name] for verdict in verdicts if name in verdict.right]
        if right:
            result[name] = float(np.mean(right))
    return result


def sharpness(picture: np.ndarray, finding: Finding) -> float | None:
    """How sharp the objects' edges are: 1.0 as in a render of the same objects, less where they are blurred.

    It is the energy of the picture's gradient within three pixels of the outlines, as a part of that of a
    render of what was found there. None where there is no object, or one that is none of this world's.
    """
    known = [one for one in finding.objects if one.shape is not None and one.colour is not None]
    if not known or len(known) < len(finding.objects) or finding.background is None:
        return None
    height, width = picture.shape[:2]
    side = min(width, height)
    placed = [
        Placed(str(one.shape), str(one.colour), one.x * width, one.y * height, one.radius * side)
        for one in known
    ]
    render = paint(Scene(background=finding.background, shadow=finding.shadow), placed, width, height)
    distance = np.min(
        [np.abs(distance_map(p.shape, p.x, p.y, p.radius, (height, width))) for p in placed], axis=0
    )
    near = distance < 3
    return _edge_energy(picture, near) / _edge_energy(render, near)


def _edge_energy(picture: np.ndarray, where: np.ndarray) -> float:
    """Sum over the marked pixels [H, W] of the squared gradient, seen through a Gaussian of 0.6 pixels.

    Without it an edge that falls between two pixels would have twice the energy of one through a pixel.
    """
    from scipy import ndimage

    levels = ndimage.gaussian_filter(picture.astype(np.float32), (0.6, 0.6, 0))
    down, across = np.gradient(levels, axis=(0, 1))
    return float(((across**2 + down**2).sum(-1))[where].sum())
