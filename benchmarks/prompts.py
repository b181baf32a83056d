"""The prompts of `bench adherence`, each with the scene that its image must show: built in, or from a file.

A file of prompts has one JSON object per line; empty lines are skipped:

    {"prompt": "a small red circle left of a blue square", "category": "mine",
     "objects": [{"shape": "circle", "colour": "red", "count": 1, "size": "small"},
                 {"shape": "square", "colour": "blue"}],
     "relation": "left", "place": "top left", "background": "navy", "without": "green", "shadow": false}

Only prompt and objects are required; an absent or null value is unspecified. `count` defaults to 1, up to
five objects in total. `relation` (left, right, above, below) is the position of the first of two objects
relative to the second, `place` the position of the center of the objects, `without` a color that no object
may have; `shadow` false asks for no shadow on the floor (true specifies nothing). Prompts of one `category`
share a score. The values are those of miniature/scene.py.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import permutations, product
from pathlib import Path
from typing import Any

from ..miniature.caption import caption, misspell, plain_caption
from ..miniature.scene import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT_COUNTS,
    HELD_OUT_PAIRS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Item,
    Scene,
    random_scene,
    with_stated_attributes,
)

EACH = 56
"""Prompts in each built-in category."""
SIX = ("single object", "two objects", "counting", "colours", "position", "attribute binding")
"""GenEval's tasks (Ghosh et al. 2023, arXiv:2310.11513); the overall score is the mean of theirs."""
MAX_OBJECTS = 5
PREFIXES = ("", "", "a photo of ", "", "a picture of ", "", "draw ", "an image of ")
"""How people begin a prompt."""
CHOICES = {
    "shape": SHAPES,
    "colour": tuple(COLORS),
    "size": tuple(SIZES),
    "relation": tuple(RELATIONS),
    "place": tuple(PLACES),
    "background": tuple(BACKGROUNDS),
    "without": tuple(COLORS),
}
OBJECT_KEYS = ("shape", "colour", "count", "size")
LINE_KEYS = ("prompt", "objects", "relation", "place", "background", "without", "shadow", "category")


@dataclass(frozen=True)
class Prompt:
    """A text, and the scene that its image must show; None in the scene is unspecified."""

    text: str
    scene: Scene
    category: str


def categories() -> list[Prompt]:
    """The built-in prompts, always the same: EACH of GenEval's six categories, of "unseen" and of "words"."""
    makers: dict[str, Callable[[random.Random], Iterator[Scene]]] = {
        "single object": _singles,
        "two objects": _twos,
        "counting": _counts,
        "colours": _colors,
        "position": _positions,
        "attribute binding": _bindings,
        "unseen": _unseen,
    }
    found = []
    for name, maker in makers.items():
        scenes = list(maker(random.Random(name)))[:EACH]
        found += [
            Prompt(PREFIXES[i % len(PREFIXES)] + plain_caption(scene), scene, name)
            for i, scene in enumerate(scenes)
        ]
    return found + [Prompt(text, scene, "words") for text, scene in _words(random.Random("words"))]


def _singles(rng: random.Random) -> Iterator[Scene]:
    """Every shape alone, small, large, in two places, on two backgrounds, in the center of one."""
    for kind, shape in product(range(8), SHAPES):
        scene = Scene((Item(shape, size={1: "small", 2: "large"}.get(kind)),))
        place = "center" if kind in (3, 7) else rng.choice(tuple(PLACES)) if kind == 4 else None
        yield replace(scene, place=place, background=rng.choice(tuple(BACKGROUNDS)) if kind > 4 else None)


def _twos(rng: random.Random) -> Iterator[Scene]:
    """Every pair of different shapes in both orders, then some on a background."""
    pairs = list(permutations(SHAPES, 2))
    rng.shuffle(pairs)
    for i, (first, second) in enumerate(pairs + pairs):
        yield Scene((Item(first), Item(second)), background=_ground(rng) if i >= len(pairs) else None)


def _counts(rng: random.Random) -> Iterator[Scene]:
    """Every count of every shape that training shows, then in a color, then on a background, then both."""
    for kind, (count, shape) in product(range(4), product((2, 3, 4), SHAPES)):
        color = rng.choice([c for c in COLORS if (shape, c) not in HELD_OUT_PAIRS])
        if (count, shape) not in HELD_OUT_COUNTS:
            item = Item(shape, color if kind in (1, 3) else None)
            yield Scene((item,) * count, background=_ground(rng) if kind > 1 else None)


def _colors(rng: random.Random) -> Iterator[Scene]:
    """Every shape in every color that training shows it in, then some on a background."""
    items = [Item(shape, c) for shape, c in product(SHAPES, COLORS) if (shape, c) not in HELD_OUT_PAIRS]
    rng.shuffle(items)
    for i, item in enumerate(items + items):
        yield Scene((item,), background=_ground(rng) if i >= len(items) else None)


def _positions(rng: random.Random) -> Iterator[Scene]:
    """Two different shapes, in every relation equally often."""
    pairs = list(permutations(SHAPES, 2))
    rng.shuffle(pairs)
    for i, (first, second) in enumerate(pairs + pairs[::-1]):
        yield Scene((Item(first), Item(second)), relation=tuple(RELATIONS)[i % 4])


def _bindings(rng: random.Random) -> Iterator[Scene]:
    """Two different shapes in different colors, one of each pair of shapes first."""
    pairs = list(permutations(SHAPES, 2))
    rng.shuffle(pairs)
    for shapes in pairs + pairs:
        while True:
            scene = Scene(tuple(map(Item, shapes, rng.sample(tuple(COLORS), 2))))
            if not scene.is_held_out():
                break
        yield scene


def _unseen(rng: random.Random) -> Iterator[Scene]:
    """Each held-out object alone four times and beside another twice; each held-out count, also in colors."""
    pairs = sorted(HELD_OUT_PAIRS)
    for kind, (shape, color) in product(range(4), pairs):
        place = rng.choice(tuple(PLACES)) if kind == 2 else None
        size = rng.choice(("small", "large")) if kind == 3 else None
        yield Scene((Item(shape, color, size),), place=place, background=_ground(rng) if kind == 1 else None)
    for kind, (shape, color) in product(range(2), pairs):
        other = Item(
            rng.choice([s for s in SHAPES if s != shape]), rng.choice([c for c in COLORS if c != color])
        )
        items = (Item(shape, color), other)
        relation = rng.choice(tuple(RELATIONS)) if kind else None
        yield Scene(items if rng.random() < 0.5 else items[::-1], relation=relation)
    counts = sorted(HELD_OUT_COUNTS)
    colors = {shape: [c for c in COLORS if (shape, c) not in HELD_OUT_PAIRS] for _, shape in counts}
    for kind, (count, shape) in product(range(5), counts):
        yield Scene((Item(shape, colors[shape][kind] if kind else None),) * count)


def _words(rng: random.Random) -> Iterator[tuple[str, Scene]]:
    """Prompts as people write them: synonyms and word order, typos, "without", capitals; a quarter each."""
    for i in range(EACH):
        kind = i % 4
        while True:
            scene = with_stated_attributes(random_scene(rng), rng)
            if kind != 2 or scene.without or not scene.shadow:
                break
        text = plain_caption(scene)
        yield (caption(scene, rng), misspell(text, rng), caption(scene, rng), text.upper())[kind], scene


def _ground(rng: random.Random) -> str:
    return rng.choice(tuple(BACKGROUNDS))


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file. Raises ValueError with the line number for the first invalid line."""
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                prompts.append(parse_prompt(line))
            except ValueError as error:
                raise ValueError(f"{path.name}, line {number}: {error}") from error
    if not prompts:
        raise ValueError(f"{path.name} has no prompts; write one JSON object per line")
    return prompts


def parse_prompt(line: str) -> Prompt:
    """The prompt of one line of such a file. Raises ValueError that says what is invalid."""
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"this is not JSON ({error.msg} at character {error.pos + 1})") from error
    _check_names(fields, LINE_KEYS, "a line")
    text, category, shadow = fields.get("prompt"), fields.get("category"), fields.get("shadow")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"prompt must be a text, got {text!r}")
    if category is not None and not isinstance(category, str):
        raise ValueError(f"category must be a text, got {category!r}")
    if shadow is not None and not isinstance(shadow, bool):
        raise ValueError(f"shadow must be true or false, got {shadow!r}")
    scene = Scene(
        items=_items(fields.get("objects")),
        relation=_one_of("relation", fields),
        place=_one_of("place", fields),
        background=_one_of("background", fields),
        shadow=shadow is not False,
        without=_one_of("without", fields),
    )
    if scene.relation is not None and len(scene.items) != 2:
        raise ValueError(f"a relation needs two objects, got {len(scene.items)}")
    return Prompt(text, scene, category or "prompts")


def _items(objects: Any) -> tuple[Item, ...]:
    if not isinstance(objects, list) or not objects:
        raise ValueError(f"objects must be a list of at least one object, got {objects!r}")
    items: list[Item] = []
    for entry in objects:
        _check_names(entry, OBJECT_KEYS, "an object")
        count = entry.get("count", 1)
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_OBJECTS:
            raise ValueError(f"count must be an integer from 1 to {MAX_OBJECTS}, got {count!r}")
        items += [Item(_one_of("shape", entry), _one_of("colour", entry), _one_of("size", entry))] * count
    if len(items) > MAX_OBJECTS:
        raise ValueError(f"a prompt may have {MAX_OBJECTS} objects in total, got {len(items)}")
    return tuple(items)


def _check_names(fields: Any, known: tuple[str, ...], what: str) -> None:
    if not isinstance(fields, dict):
        raise ValueError(f"{what} must be a JSON object with {', '.join(known)}, got {fields!r}")
    for name in fields:
        if name not in known:
            raise ValueError(f"{what} has the keys {', '.join(known)}, got {name!r}")


def _one_of(name: str, fields: dict[str, Any]) -> str | None:
    value = fields.get(name)
    if value is not None and value not in CHOICES[name]:
        raise ValueError(f"{name} must be one of {', '.join(CHOICES[name])}, got {value!r}")
    return value
