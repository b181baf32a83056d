"""Edits of the toy world: an image, an instruction as people write it, and the edited image.

An edit changes what it names and nothing else: every other object keeps its position, size and color to the
pixel. Results that are held out (scene.HELD_OUT_PAIRS, HELD_OUT_COUNTS) are not drawn for training; the
benchmark draws them (`random_edit` with `held_out`). instructions.py has the words.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .draw import render
from .instructions import Instructions, Named
from .scene import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT_COUNTS,
    HELD_OUT_PAIRS,
    OFFSET,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Item,
    PlacedItem,
    Scene,
    layout,
    random_scene,
)

SIDE = 128
"""Width and height of an edited image, in pixels."""
BESIDE = 0.40
"""Distance of an object from the one that it is added beside, as a fraction of the side."""
GAP = 1.12
"""Smallest distance of two objects' centers, in sums of their radii."""
MARGIN = 0.15
"""Smallest distance of a center from the image's border, as a fraction of the side."""


@dataclass(frozen=True)
class PlacedScene:
    """Objects in place, in a room of one color."""

    objects: tuple[PlacedItem, ...]
    background: str
    shadow: bool = True

    def render(self) -> np.ndarray:
        """The image uint8 [SIDE, SIDE, 3]."""
        scene = Scene(background=self.background, shadow=self.shadow)
        return render(scene, list(self.objects), SIDE, SIDE)


@dataclass(frozen=True)
class Edit:
    """References, the instruction, and the scene that it describes.

    `edited` are the positions in `after.objects` of objects that the edit moved, added or changed.
    """

    kind: str
    references: tuple[PlacedScene, ...]
    instruction: str
    after: PlacedScene
    edited: tuple[int, ...] = ()


def is_held_out(placed: PlacedScene) -> bool:
    """Whether training must not draw it."""
    alike = Counter((one.shape, one.color) for one in placed.objects)
    counts = {(count, shape) for (shape, _), count in alike.items()}
    return bool(alike.keys() & HELD_OUT_PAIRS or counts & HELD_OUT_COUNTS)


def random_placed_scene(rng: random.Random, kind: str | None = None) -> PlacedScene:
    """A random scene with its objects in place that is not held out, of one of scene.random_scene's kinds."""
    scene = random_scene(rng, kind)
    return PlacedScene(tuple(layout(scene, rng, SIDE, SIDE)), str(scene.background), scene.shadow)


def random_edit(rng: random.Random, kind: str | None = None, held_out: bool = False) -> Edit:
    """An edit of one of KINDS, or of any; its result is held out exactly if `held_out`.

    Raises ValueError for another kind, and for one that cannot have a held-out result.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"an edit's kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if held_out and kind not in HELD_OUT_KINDS:
        raise ValueError(f"only {', '.join(HELD_OUT_KINDS)} have held-out results, got {kind!r}")
    while True:
        edit = _MAKERS[kind or rng.choice(ONE_REFERENCE)](rng, Instructions(rng))
        if edit is not None and is_held_out(edit.after) == held_out:
            return edit


def named(placed: PlacedScene, index: int) -> Named:
    """How an instruction may refer to one object of a scene with one or two."""
    one = placed.objects[index]
    others = [other for i, other in enumerate(placed.objects) if i != index]
    side = None
    if others:
        dx, dy = one.x - others[0].x, one.y - others[0].y
        side = ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("top" if dy < 0 else "bottom")
    return Named(
        Item(one.shape, one.color),
        alone=not others,
        shape_is_unique=all(one.shape != other.shape for other in others),
        color_is_unique=all(one.color != other.color for other in others),
        side=side,
    )


def _one_of(rng: random.Random) -> tuple[PlacedScene, int]:
    """A scene of one or two objects, and the index of one of them."""
    placed = random_placed_scene(rng, rng.choices(("single", "pair"), (0.35, 0.65))[0])
    return placed, rng.randrange(len(placed.objects))


def _with_object(placed: PlacedScene, index: int, changed: PlacedItem) -> PlacedScene:
    objects = list(placed.objects)
    objects[index] = changed
    return replace(placed, objects=tuple(objects))


def _fits(placed: PlacedScene, index: int | None, moved: PlacedItem) -> bool:
    """Whether the object stays inside and clear of the scene's others, those but `index`."""
    if not all(MARGIN * SIDE <= value <= (1 - MARGIN) * SIDE for value in (moved.x, moved.y)):
        return False
    others = [other for i, other in enumerate(placed.objects) if i != index]
    return all(
        math.hypot(moved.x - one.x, moved.y - one.y) >= GAP * (moved.radius + one.radius) for one in others
    )


def _recolor(rng: random.Random, words: Instructions) -> Edit | None:
    if rng.random() < 0.15:
        placed = random_placed_scene(rng, rng.choice(("pair", "count")))
        color = rng.choice(tuple(COLORS))
        objects = tuple(replace(one, color=color) for one in placed.objects)
        if objects == placed.objects:
            return None
        text, edited = words.recolor_all(len(objects), color), tuple(range(len(objects)))
        return Edit("recolor", (placed,), text, replace(placed, objects=objects), edited)
    placed, i = _one_of(rng)
    color = rng.choice([name for name in COLORS if name != placed.objects[i].color])
    after = _with_object(placed, i, replace(placed.objects[i], color=color))
    return Edit("recolor", (placed,), words.recolor(named(placed, i), color), after, (i,))


def _replace_shape(rng: random.Random, words: Instructions) -> Edit | None:
    placed, i = _one_of(rng)
    shape = rng.choice([name for name in SHAPES if name != placed.objects[i].shape])
    after = _with_object(placed, i, replace(placed.objects[i], shape=shape))
    return Edit("shape", (placed,), words.replace_shape(named(placed, i), shape), after, (i,))


def _move(rng: random.Random, words: Instructions) -> Edit | None:
    placed, i = _one_of(rng)
    place = rng.choice(tuple(PLACES))
    moved = _at(placed.objects[i], place)
    far = max(abs(moved.x - placed.objects[i].x), abs(moved.y - placed.objects[i].y)) > 0.12 * SIDE
    if not far or not _fits(placed, i, moved):
        return None
    text = words.move(named(placed, i), place)
    return Edit("move", (placed,), text, _with_object(placed, i, moved), (i,))


def _at(one: PlacedItem, place: str) -> PlacedItem:
    dx, dy = PLACES[place]
    return replace(one, x=SIDE * (0.5 + OFFSET * dx), y=SIDE * (0.5 + OFFSET * dy))


def _resize(rng: random.Random, words: Instructions) -> Edit | None:
    placed, i = _one_of(rng)
    one = placed.objects[i]
    sizes = tuple(SIZES.values())
    now = min(range(len(sizes)), key=lambda k: abs(sizes[k] - one.radius / SIDE))
    step = rng.choice((-1, 1))
    if not 0 <= now + step < len(sizes):
        return None
    changed = replace(one, radius=one.radius * sizes[now + step] / sizes[now])
    if not _fits(placed, i, changed):
        return None
    text = words.resize(named(placed, i), step > 0)
    return Edit("resize", (placed,), text, _with_object(placed, i, changed), (i,))


def _add(rng: random.Random, words: Instructions) -> Edit | None:
    placed = random_placed_scene(rng, "single")
    size = rng.choice((None, None, "small", "large"))
    item = Item(rng.choice(SHAPES), rng.choice(tuple(COLORS)), size)
    new = PlacedItem(str(item.shape), str(item.color), 0.0, 0.0, SIDE * SIZES[size or "medium"])
    if rng.random() < 0.5:
        place = rng.choice(tuple(PLACES))
        new, text = _at(new, place), words.add(item, place)
    else:
        relation, one = rng.choice(tuple(RELATIONS)), placed.objects[0]
        dx, dy = RELATIONS[relation]
        new = replace(new, x=one.x + BESIDE * SIDE * dx, y=one.y + BESIDE * SIDE * dy)
        text = words.add_beside(item, relation, named(placed, 0))
    if not _fits(placed, None, new):
        return None
    return Edit("add", (placed,), text, replace(placed, objects=(*placed.objects, new)), (1,))


def _remove(rng: random.Random, words: Instructions) -> Edit | None:
    placed, i = _one_of(rng)
    after = replace(placed, objects=placed.objects[:i] + placed.objects[i + 1 :])
    return Edit("remove", (placed,), words.remove(named(placed, i)), after)


def _background(rng: random.Random, words: Instructions) -> Edit | None:
    placed = random_placed_scene(rng)
    color = rng.choice([name for name in BACKGROUNDS if name != placed.background])
    return Edit("background", (placed,), words.background(color), replace(placed, background=color))


def _two_references(rng: random.Random, words: Instructions) -> Edit | None:
    first, second = random_placed_scene(rng, "single"), random_placed_scene(rng, "single")
    color = second.objects[0].color
    if color == first.objects[0].color:
        return None
    after = _with_object(first, 0, replace(first.objects[0], color=color))
    return Edit("two references", (first, second), words.combine(), after, (0,))


_MAKERS: dict[str, Callable[[random.Random, Instructions], Edit | None]] = {
    "recolor": _recolor,
    "shape": _replace_shape,
    "move": _move,
    "resize": _resize,
    "add": _add,
    "remove": _remove,
    "background": _background,
    "two references": _two_references,
}
KINDS = tuple(_MAKERS)
ONE_REFERENCE = KINDS[:-1]
"""Kinds with one reference image."""
HELD_OUT_KINDS = ("recolor", "shape", "add", "two references")
"""Kinds whose result can be held out."""
