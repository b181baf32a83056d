"""The toy world of the miniature: random scenes of simple objects.

A `Scene` lists objects and their attributes; `layout` chooses a position and a size for each. draw.py renders
a scene, caption.py describes it, checker.py judges any image against it. An attribute that a caption does not
state is either free (color, background) or has a default (medium size, the middle, first on the left), so
that a short prompt has a good answer too.

Some combinations are held out (`HELD_OUT_PAIRS`, `HELD_OUT_COUNTS`): training neither draws nor names them.
Whether the network generates them shows whether it learned attributes or memorized images.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross")
COLORS = {
    "red": (214, 40, 48),
    "orange": (245, 135, 31),
    "yellow": (250, 214, 50),
    "green": (46, 160, 74),
    "blue": (38, 96, 214),
    "purple": (126, 58, 176),
    "pink": (244, 126, 178),
}
BACKGROUNDS = {
    "gray": (168, 170, 174),
    "beige": (232, 216, 186),
    "mint": (186, 228, 206),
    "lavender": (206, 198, 234),
    "sky": (172, 212, 242),
    "navy": (30, 40, 78),
}
SIZES = {"small": 0.13, "medium": 0.165, "large": 0.205}
"""Radius of an object, as a fraction of the image's shorter side; captions never say "medium"."""
COUNTED = {1: 0.165, 2: 0.15, 3: 0.14, 4: 0.14}
"""Radius of each of several equal objects, by their count."""
PLACES = {
    "center": (0.0, 0.0),
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "top": (0.0, -1.0),
    "bottom": (0.0, 1.0),
    "top left": (-1.0, -1.0),
    "top right": (1.0, -1.0),
    "bottom left": (-1.0, 1.0),
    "bottom right": (1.0, 1.0),
}
"""Direction from the middle, (x, y), each -1, 0 or 1."""
OFFSET = 0.20
"""Distance of a place from the middle, as a fraction of each side."""
RELATIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "above": (0.0, -1.0), "below": (0.0, 1.0)}
"""Direction of the first of two objects from the second."""
APART = 0.24
"""Distance of each of two objects from the middle, as a fraction of a side."""
GROUPS = {
    2: (((0.27, 0.5), (0.73, 0.5)),),
    3: (((0.5, 0.27), (0.25, 0.7), (0.75, 0.7)), ((0.25, 0.3), (0.75, 0.3), (0.5, 0.73))),
    4: (((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)),),
}
"""Positions of several equal objects, (x, y) as fractions of the sides."""
JITTER = 0.02
"""Largest deviation from such a position, as a fraction of the shorter side."""

HELD_OUT_PAIRS = frozenset(
    (shape, tuple(COLORS)[(3 * i + 1) % len(COLORS)]) for i, shape in enumerate(SHAPES)
)
"""(shape, color) of objects that training never draws or names: one per shape, one per color."""
HELD_OUT_COUNTS = frozenset({(2, "diamond"), (3, "heart"), (4, "cross")})
"""(count, shape) of equal objects that training never draws or names."""


@dataclass(frozen=True)
class Item:
    """One object; None stands for an unspecified attribute."""

    shape: str | None = None
    color: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Scene:
    """One object at a place, two different ones in a relation, or two to four equal ones.

    `relation` is that of the first of two objects to the second. `shadow` False: no shadow on the floor.
    `without` is a color that no object has. None stands for an unspecified attribute.
    """

    items: tuple[Item, ...] = ()
    relation: str | None = None
    place: str | None = None
    background: str | None = None
    shadow: bool = True
    without: str | None = None

    @property
    def kind(self) -> str:
        """One of "empty", "single", "pair", "count"."""
        if len(self.items) < 2:
            return "single" if self.items else "empty"
        return "pair" if len(set(self.items)) == 2 and len(self.items) == 2 else "count"

    def is_held_out(self) -> bool:
        """Whether training must not draw or name it."""
        pairs = {(item.shape, item.color) for item in self.items}
        alike = (len(self.items), self.items[0].shape) if self.kind == "count" else None
        return bool(pairs & HELD_OUT_PAIRS) or alike in HELD_OUT_COUNTS


def random_scene(rng: random.Random, kind: str | None = None) -> Scene:
    """A scene with every attribute set, as training draws them: none that is held out.

    Raises ValueError for an unknown kind.
    """
    while True:
        scene = _random_scene(rng, kind or rng.choices(("single", "pair", "count"), (0.27, 0.56, 0.17))[0])
        if not scene.is_held_out():
            return scene


def _random_scene(rng: random.Random, kind: str) -> Scene:
    background = rng.choice(tuple(BACKGROUNDS))
    shadow = rng.random() > 0.1
    if kind == "single":
        place = "center" if rng.random() < 0.4 else rng.choice(tuple(PLACES))
        return Scene((_random_item(rng),), None, place, background, shadow)
    if kind == "count":
        item = Item(rng.choice(SHAPES), rng.choice(tuple(COLORS)), "medium")
        return Scene((item,) * rng.randint(2, 4), None, None, background, shadow)
    if kind != "pair":
        raise ValueError(f"a scene's kind must be single, pair or count, got {kind!r}")
    first, second = _random_item(rng), _random_item(rng)
    while (first.shape, first.color) == (
        second.shape,
        second.color,
    ) or first.size == second.size == "large":
        second = _random_item(rng)  # two large ones do not fit beside each other
    relation = "left" if rng.random() < 0.4 else rng.choice(tuple(RELATIONS))
    return Scene((first, second), relation, None, background, shadow)


def _random_item(rng: random.Random) -> Item:
    size = "medium" if rng.random() < 0.5 else rng.choice(("small", "large"))
    return Item(rng.choice(SHAPES), rng.choice(tuple(COLORS)), size)


def with_stated_attributes(scene: Scene, rng: random.Random) -> Scene:
    """The scene reduced to what one caption states: all that differs from a default, the rest at random."""
    verbosity = rng.random()

    def maybe(value: str | None, share: float) -> str | None:
        return value if rng.random() < max(share, verbosity) else None

    states_colors = rng.random() < 0.85
    twins = scene.kind == "pair" and scene.items[0].shape == scene.items[1].shape
    items = [
        Item(
            item.shape,
            item.color if twins or (states_colors and (scene.kind != "pair" or rng.random() < 0.9)) else None,
            None if item.size == "medium" else item.size,
        )
        for item in (scene.items[:1] if scene.kind == "count" else scene.items)
    ]
    without = None
    if all(item.color is None for item in items) and rng.random() < 0.4:
        used = {item.color for item in scene.items}
        without = rng.choice([color for color in COLORS if color not in used])
    return replace(
        scene,
        items=tuple(items * (len(scene.items) if scene.kind == "count" else 1)),
        relation=maybe(scene.relation, 0.0) if scene.relation == "left" else scene.relation,
        place=maybe(scene.place, 0.0) if scene.place == "center" else scene.place,
        background=maybe(scene.background, 0.2),
        without=without,
    )


@dataclass(frozen=True)
class PlacedItem:
    """An object in an image: center and radius in pixels, y downwards."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


def layout(scene: Scene, rng: random.Random, width: int, height: int) -> list[PlacedItem]:
    """Random positions and radii of a scene's objects in an image of `width` x `height` pixels.

    Raises ValueError for a scene with an unspecified attribute.
    """
    side = min(width, height)
    centers = _centers(scene, rng)
    placed = []
    for item, (x, y) in zip(scene.items, centers, strict=True):
        if item.shape is None or item.color is None or item.size is None or scene.background is None:
            raise ValueError(f"a scene needs every attribute to be drawn, got {scene}")
        radius = COUNTED[len(scene.items)] if scene.kind == "count" else SIZES[item.size]
        placed.append(
            PlacedItem(
                item.shape,
                item.color,
                width * x + rng.uniform(-JITTER, JITTER) * side,
                height * y + rng.uniform(-JITTER, JITTER) * side,
                side * radius * rng.uniform(0.95, 1.05),
            )
        )
    return placed


def _centers(scene: Scene, rng: random.Random) -> list[tuple[float, float]]:
    """(x, y) of each object, as fractions of the sides."""
    if scene.kind == "count":
        return list(rng.choice(GROUPS[len(scene.items)]))
    if scene.kind == "pair":
        if scene.relation is None:
            raise ValueError(f"a scene needs every attribute to be drawn, got {scene}")
        dx, dy = RELATIONS[scene.relation]
        slack = rng.uniform(-0.06, 0.06)  # across the line between the two
        across = (slack, 0.0) if dy else (0.0, slack)
        first = (0.5 + APART * dx + across[0], 0.5 + APART * dy + across[1])
        return [first, (1 - first[0], 1 - first[1])]
    if scene.place is None:
        raise ValueError(f"a scene needs every attribute to be drawn, got {scene}")
    dx, dy = PLACES[scene.place]
    return [(0.5 + OFFSET * dx, 0.5 + OFFSET * dy)]
