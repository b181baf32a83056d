"""The training set: latents of rendered scenes with labels, in one file.

The file holds for each latent its scene, as integers, and labels of its image tokens (`token_labels`): shape
and color of the object there, and the coverage of each sixteenth of the token's square. Any number of
captions can be drawn for a scene; the token labels train the head on hidden states (base.RepaHead).
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..flux_core.model.autoencoder import AutoEncoder, to_model_space
from ..flux_core.train.checkpoint import write_safetensors
from ..flux_core.train.data import LatentBatch
from ..flux_core.train.progress import ProgressLine
from ..flux_core.weights import read_state_dict
from .autoencoder import from_uint8
from .caption import caption
from .draw import mask, render
from .pca import encode_linear, linear_code
from .scene import (
    BACKGROUNDS,
    COLORS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Item,
    PlacedItem,
    Scene,
    layout,
    random_scene,
    with_stated_attributes,
)

ImageSize = tuple[int, int, float]
"""Width, height, and share of the images that have them."""
IMAGE_SIZES: tuple[ImageSize, ...] = ((128, 128, 0.64), (160, 112, 0.18), (112, 160, 0.18))
"""Several aspect ratios of about one area, as FLUX is trained on."""
TOKEN = 16
"""Pixels along the side of a token's square."""
CELLS = 4
"""Cells along the side of a token's square, each with its own coverage."""

_COLUMNS: tuple[tuple[str, ...], ...] = (
    SHAPES,
    tuple(COLORS),
    tuple(SIZES),
    SHAPES,
    tuple(COLORS),
    tuple(SIZES),
    tuple(RELATIONS),
    tuple(PLACES),
    tuple(BACKGROUNDS),
)


def draw_size(rng: random.Random, sizes: Sequence[ImageSize] = IMAGE_SIZES) -> tuple[int, int]:
    """A random (width, height), each with its share."""
    width, height, _ = rng.choices(sizes, [share for *_, share in sizes])[0]
    return width, height


def encode_scene(scene: Scene) -> list[int]:
    """A scene with every attribute set, and at least one object, as 11 small integers."""
    first, second = scene.items[0], scene.items[1] if scene.kind == "pair" else Item()
    values = (first.shape, first.color, first.size, second.shape, second.color, second.size)
    values += (scene.relation, scene.place, scene.background)
    codes = [0 if v is None else 1 + column.index(v) for v, column in zip(values, _COLUMNS, strict=True)]
    return [len(scene.items), *codes, int(scene.shadow)]


def decode_scene(encoded: Sequence[int]) -> Scene:
    """The inverse of `encode_scene`."""
    count, *codes, shadow = encoded
    values = [column[code - 1] if code else None for column, code in zip(_COLUMNS, codes, strict=True)]
    first, second = Item(*values[:3]), Item(*values[3:6])
    items = (first, second) if second.shape else (first,) * count
    return Scene(items, values[6], values[7], values[8], bool(shadow))


def token_labels(objects: list[PlacedItem], width: int, height: int) -> np.ndarray:
    """Labels of each token, uint8 [N, 18]: shape, color (0 for none), coverage of 16 cells in 0..255."""
    cell = TOKEN // CELLS
    wide, high = width // cell, height // cell
    cover = np.zeros((high, wide), dtype=np.float32)
    labels = np.zeros((height // TOKEN, width // TOKEN, 2 + CELLS * CELLS), dtype=np.uint8)
    most = np.full(labels.shape[:2], 0.3 / CELLS**2, dtype=np.float32)
    for placed in objects:
        part = mask(placed.shape, (placed.x / cell, placed.y / cell), placed.radius / cell, wide, high)
        cover = np.maximum(cover, part)
        by_token = part.reshape(high // CELLS, CELLS, wide // CELLS, CELLS).mean(axis=(1, 3))
        codes = (1 + SHAPES.index(placed.shape), 1 + tuple(COLORS).index(placed.color))
        labels[by_token > most, :2] = codes
        most = np.maximum(most, by_token)
    cells = cover.reshape(high // CELLS, CELLS, wide // CELLS, CELLS).transpose(0, 2, 1, 3)
    labels[..., 2:] = np.round(cells.reshape(*labels.shape[:2], -1) * 255)
    return labels.reshape(-1, labels.shape[-1])


def write_latents(
    path: Path,
    vae: AutoEncoder,
    count: int,
    seed: int = 0,
    workers: int | None = None,
    sizes: Sequence[ImageSize] = IMAGE_SIZES,
) -> None:
    """Draw about `count` random scenes; write latents (model space, float16), scenes, token labels to `path`.

    The encoder must be linear (pca.set_pca_encoder). `workers` processes render, by default one per core;
    with 1 this process does.
    """
    code = linear_code(vae)
    line, done = ProgressLine(count), 0
    tensors: dict[str, list[Tensor]] = {}
    jobs = []
    for width, height, share in sizes:
        wanted = max(1, round(count * share))
        jobs += [
            (seed * 1_000_003 + len(jobs) + i, min(64, wanted - start), width, height)
            for i, start in enumerate(range(0, wanted, 64))
        ]
    workers = workers or os.cpu_count() or 1
    with ExitStack() as stack:
        spread = map if workers == 1 else stack.enter_context(ProcessPoolExecutor(workers)).map
        for (_, _, width, height), (scenes, labels, images) in zip(
            jobs, spread(_draw_part, jobs), strict=True
        ):
            latents = to_model_space(encode_linear(from_uint8(images), code)).half()
            found = {"latents": latents, "scenes": torch.tensor(scenes), "tokens": torch.from_numpy(labels)}
            for name, value in found.items():
                tensors.setdefault(f"{width}x{height}/{name}", []).append(value)
            done += len(images)
            line.update(min(done, count), "images drawn and encoded")
    write_safetensors(path, {k: torch.cat(v) for k, v in tensors.items()}, {"seed": str(seed)})


def _draw_part(job: tuple[int, int, int, int]) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    """(encoded scenes, token labels [count, N, 18], images [count, H, W, 3]) of (seed, count, W, H)."""
    seed, count, width, height = job
    rng = random.Random(seed)
    scenes, labels, images = [], [], []
    for _ in range(count):
        scene = random_scene(rng)
        objects = layout(scene, rng, width, height)
        scenes.append(encode_scene(scene))
        labels.append(token_labels(objects, width, height))
        images.append(render(scene, objects, width, height))
    return scenes, np.stack(labels), np.stack(images)


class LatentSet:
    """Latents with their scenes, from a file of `write_latents`. Raises ValueError for another file."""

    def __init__(self, path: Path) -> None:
        tensors = read_state_dict(path)
        sizes = sorted({name.split("/")[0] for name in tensors if name.endswith("/tokens")})
        if not sizes:
            raise ValueError(f"{path.name} holds no latents; run the stage data again")
        self.parts = [
            {name: tensors[f"{size}/{name}"] for name in ("latents", "scenes", "tokens")} for size in sizes
        ]
        self.weights = [len(part["latents"]) for part in self.parts]

    def batch(self, size: int, rng: random.Random, empty_share: float) -> LatentBatch:
        """Latents, captions and token labels uint8 [size, N, 18], at random and all of one image size.

        Each caption states some of its scene's attributes; `empty_share` of them are empty, for guidance.
        """
        part = rng.choices(self.parts, self.weights)[0]
        picks = [rng.randrange(len(part["latents"])) for _ in range(size)]
        captions = []
        for row in part["scenes"][picks].tolist():
            captions.append(
                ""
                if rng.random() < empty_share
                else caption(with_stated_attributes(decode_scene(row), rng), rng)
            )
        return LatentBatch(part["latents"][picks].float(), captions, part["tokens"][picks])
