"""Two painters without a network: one paints what it is asked for, the other never."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from rectiflux.benchmarks.prompts import Prompt
from rectiflux.miniature.draw import draw
from rectiflux.miniature.scene import COLORS, SHAPES, Item, Scene


def whole(told: Scene, rng: random.Random) -> Scene:
    """The scene with everything set that was left open."""
    colours = [name for name in COLORS if name != told.without]
    items = [
        Item(item.shape or "star", item.color or rng.choice(colours), item.size or "medium")
        for item in told.items
    ]
    if told.kind == "count":
        items = items[:1] * len(items)
    return replace(
        told,
        items=tuple(items),
        relation=(told.relation or "left") if told.kind == "pair" else None,
        place=(told.place or "center") if told.kind == "single" else None,
        background=told.background or "gray",
    )


def paint_truly(asked: Sequence[Prompt]) -> list[np.ndarray]:
    rng = random.Random(0)
    return [draw(whole(prompt.scene, rng), rng) for prompt in asked]


def paint_falsely(asked: Sequence[Prompt]) -> list[np.ndarray]:
    """As many objects, each in the world's next shape: never the ones that were asked for."""
    rng, pictures = random.Random(0), []
    for prompt in asked:
        scene = whole(prompt.scene, rng)
        after = dict(zip(SHAPES, (*SHAPES[1:], SHAPES[0]), strict=True))
        items = tuple(replace(item, shape=after[str(item.shape)]) for item in scene.items)
        pictures.append(draw(replace(scene, items=items), rng))
    return pictures
