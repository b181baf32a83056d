"""How accurate the checker is: on true renders, on near misses of every kind, after an autoencoder."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ..flux_core.model.autoencoder import AutoEncoder
from ..miniature.autoencoder import from_uint8, psnr, to_uint8
from ..miniature.caption import OPPOSITE
from ..miniature.checker import judge, parse_scene
from ..miniature.draw import draw
from ..miniature.scene import (
    BACKGROUNDS,
    COLORS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Item,
    Scene,
    random_scene,
)

SIDES = ((128, 128), (160, 112), (112, 160), (192, 192), (256, 256))
"""Widths and heights of the renders."""


def any_scene(rng: random.Random) -> Scene:
    """A scene with every attribute set; a third have an object changed, so that held-out ones occur too."""
    scene = random_scene(rng)
    if rng.random() < 1 / 3:
        changed = replace(scene.items[0], shape=rng.choice(SHAPES), color=rng.choice(tuple(COLORS)))
        alike = scene.kind == "count"
        others = {(item.shape, item.color) for item in scene.items[1:]}
        if alike or (changed.shape, changed.color) not in others:
            scene = replace(
                scene, items=(changed,) * len(scene.items) if alike else (changed, *scene.items[1:])
            )
    return scene


def near_misses(scene: Scene, rng: random.Random) -> Iterator[tuple[str, Scene]]:
    """(kind, scene) with one attribute wrong; one of each kind that applies to the true scene."""
    first, alike = scene.items[0], scene.kind == "count"

    def with_first(item: Item) -> Scene:
        return replace(scene, items=(item,) * len(scene.items) if alike else (item, *scene.items[1:]))

    yield "shape", with_first(replace(first, shape=_other(SHAPES, first.shape, rng)))
    yield "colour", with_first(replace(first, color=_other(tuple(COLORS), first.color, rng)))
    yield "background", replace(scene, background=_other(tuple(BACKGROUNDS), scene.background, rng))
    without_color = tuple(replace(item, color=None) for item in scene.items)
    yield "without", replace(scene, items=without_color, without=first.color)
    more, fewer = (*scene.items, scene.items[-1]), scene.items[:-1]
    yield "count", replace(scene, items=fewer if fewer and rng.random() < 0.5 else more, relation=None)
    if scene.shadow:
        yield "shadow", replace(scene, shadow=False)
    if not alike:
        yield "size", with_first(replace(first, size=_other(tuple(SIZES), first.size, rng)))
    if scene.place is not None:
        yield "place", replace(scene, place=_other(tuple(PLACES), scene.place, rng))
    if scene.relation is not None:
        yield "relation", replace(scene, relation=OPPOSITE[scene.relation])
        across = [name for name in RELATIONS if name not in (scene.relation, OPPOSITE[scene.relation])]
        yield "direction", replace(scene, relation=rng.choice(across))
        second = scene.items[1]
        if first.shape != second.shape and first.color != second.color:
            swapped = (replace(first, color=second.color), replace(second, color=first.color))
            yield "binding", replace(scene, items=swapped)


def _other(values: tuple[str, ...], value: str | None, rng: random.Random) -> str:
    return rng.choice([other for other in values if other != value])


def checker_accuracy(count: int, seed: int = 0) -> dict[str, Any]:
    """Shares of `count` true renders that pass, by size, and of near misses that pass, by kind."""
    rng = random.Random(seed)
    right: Counter[str] = Counter()
    drawn: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    for i in range(count):
        width, height = SIDES[i % len(SIDES)]
        scene = any_scene(rng)
        finding = parse_scene(draw(scene, rng, width, height))
        drawn[f"{width}x{height}"] += 1
        right[f"{width}x{height}"] += judge(finding, scene).passes
        for kind, wrong in near_misses(scene, rng):
            tried[kind] += 1
            accepted[kind] += judge(finding, wrong).passes
    return {
        "renders": count,
        "accuracy": sum(right.values()) / count,
        "accuracy_by_size": {size: right[size] / drawn[size] for size in drawn},
        "mismatches": sum(tried.values()),
        "false_accepts": sum(accepted.values()) / sum(tried.values()),
        "false_accepts_by_kind": {kind: accepted[kind] / tried[kind] for kind in tried},
    }


def autoencoder_accuracy(autoencoder: AutoEncoder, count: int, seed: int = 0) -> dict[str, float]:
    """Share of `count` renders of 128 x 128 that pass after encoding and decoding, and their PSNR in dB."""
    rng = random.Random(seed)
    passed, noise = 0, []
    for _ in range(0, count, 16):
        scenes = [any_scene(rng) for _ in range(16)]
        images = from_uint8(np.stack([draw(scene, rng) for scene in scenes]))
        decoded = autoencoder.decode(autoencoder.encode(images.to(autoencoder.device))).float().cpu()
        noise.append(psnr(decoded, images))
        verdicts = map(judge, map(parse_scene, to_uint8(decoded)), scenes)
        passed += sum(verdict.passes for verdict in verdicts)
    return {"passes": passed / (16 * len(noise)), "psnr": sum(noise) / len(noise)}
