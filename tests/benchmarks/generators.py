"""Two image generators without a network: one follows every prompt, the other none."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from rectiflux.benchmarks.prompts import Prompt
from rectiflux.miniature.draw import draw
from rectiflux.miniature.scene import COLORS, SHAPES, Item, Scene


def complete(scene: Scene, rng: random.Random) -> Scene:
    """The scene with a value for every attribute that it leaves unspecified."""
    colors = [name for name in COLORS if name != scene.without]
    items = [
        Item(item.shape or "star", item.color or rng.choice(colors), item.size or "medium")
        for item in scene.items
    ]
    if scene.kind == "count":
        items = items[:1] * len(items)
    return replace(
        scene,
        items=tuple(items),
        relation=(scene.relation or "left") if scene.kind == "pair" else None,
        place=(scene.place or "center") if scene.kind == "single" else None,
        background=scene.background or "gray",
    )


def generate_right(prompts: Sequence[Prompt]) -> list[np.ndarray]:
    rng = random.Random(0)
    return [draw(complete(prompt.scene, rng), rng) for prompt in prompts]


def generate_wrong(prompts: Sequence[Prompt]) -> list[np.ndarray]:
    """As many objects as asked for, each in the next of SHAPES."""
    rng, images = random.Random(0), []
    following = dict(zip(SHAPES, (*SHAPES[1:], SHAPES[0]), strict=True))
    for prompt in prompts:
        scene = complete(prompt.scene, rng)
        items = tuple(replace(item, shape=following[str(item.shape)]) for item in scene.items)
        images.append(draw(replace(scene, items=items), rng))
    return images
