"""The training set: latents of drawn pictures with what they show, in one file.

Beside each latent lie its scene, as numbers, and what each image token covers (`token_labels`): the shape and
colour of the object there and how much of each sixteenth of the token's square it fills. The scene gives
captions, as many as one likes; the token's labels are what the network's middle is taught to know (flow.py).
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
from .autoencoder import to_tensor
from .caption import caption
from .draw import mask, paint
from .pca import encode_fast, linear_code
from .scene import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Item,
    Placed,
    Scene,
    layout,
    random_scene,
    told,
)

ImageSize = tuple[int, int, float]
"""Width, height, and share of the images that have them."""
IMAGE_SIZES: tuple[ImageSize, ...] = ((128, 128, 0.64), (160, 112, 0.18), (112, 160, 0.18))
"""Several aspect ratios of about one area, as FLUX is trained on."""
TOKEN = 16
"""Pixels along the side of a token's square."""
CELLS = 4
"""Cells along the side of a token's square for which coverage is told."""

_COLUMNS: tuple[tuple[str, ...], ...] = (
    SHAPES,
    tuple(COLOURS),
    tuple(SIZES),
    SHAPES,
    tuple(COLOURS),
    tuple(SIZES),
    tuple(RELATIONS),
    tuple(PLACES),
    tuple(BACKGROUNDS),
)


def draw_size(rng: random.Random, sizes: Sequence[ImageSize] = IMAGE_SIZES) -> tuple[int, int]:
    """A random (width, height), each with its share."""
    width, height, _ = rng.choices(sizes, [share for *_, share in sizes])[0]
    return width, height


def to_numbers(scene: Scene) -> list[int]:
    """A complete scene with one or more objects as 11 small numbers: `from_numbers` turns them back."""
    first, second = scene.items[0], scene.items[1] if scene.kind == "pair" else Item()
    values = (first.shape, first.colour, first.size, second.shape, second.colour, second.size)
    values += (scene.relation, scene.place, scene.background)
    numbers = [0 if v is None else 1 + column.index(v) for v, column in zip(values, _COLUMNS, strict=True)]
    return [len(scene.items), *numbers, int(scene.shadow)]


def from_numbers(numbers: Sequence[int]) -> Scene:
    """The scene that `to_numbers` turned into numbers."""
    count, *codes, shadow = numbers
    values = [column[code - 1] if code else None for column, code in zip(_COLUMNS, codes, strict=True)]
    first, second = Item(*values[:3]), Item(*values[3:6])
    items = (first, second) if second.shape else (first,) * count
    return Scene(items, values[6], values[7], values[8], bool(shadow))


def token_labels(objects: list[Placed], width: int, height: int) -> np.ndarray:
    """What each token covers, uint8 [N, 18]: shape, colour (0 for none), coverage of 16 cells in 0..255."""
    cell = TOKEN // CELLS
    wide, high = width // cell, height // cell
    cover = np.zeros((high, wide), dtype=np.float32)
    labels = np.zeros((height // TOKEN, width // TOKEN, 2 + CELLS * CELLS), dtype=np.uint8)
    most = np.full(labels.shape[:2], 0.3 / CELLS**2, dtype=np.float32)
    for placed in objects:
        part = mask(placed.shape, (placed.x / cell, placed.y / cell), placed.radius / cell, wide, high)
        cover = np.maximum(cover, part)
        by_token = part.reshape(high // CELLS, CELLS, wide // CELLS, CELLS).mean(axis=(1, 3))
        codes = (1 + SHAPES.index(placed.shape), 1 + tuple(COLOURS).index(placed.colour))
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

    The encoder must be write_encoder's (pca.py), whose linear code makes this as quick as the drawing,
    which `workers` processes do: as many as there are cores, unless told; with 1 it is done in this one.
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
        for (_, _, width, height), (numbers, labels, pictures) in zip(
            jobs, spread(_draw_some, jobs), strict=True
        ):
            latents = to_model_space(encode_fast(to_tensor(pictures), code)).half()
            found = {"latents": latents, "scenes": torch.tensor(numbers), "tokens": torch.from_numpy(labels)}
            for name, value in found.items():
                tensors.setdefault(f"{width}x{height}/{name}", []).append(value)
            done += len(pictures)
            line.update(min(done, count), "pictures drawn and encoded")
    write_safetensors(path, {k: torch.cat(v) for k, v in tensors.items()}, {"seed": str(seed)})


def _draw_some(job: tuple[int, int, int, int]) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    """(scenes as numbers, token labels [count, N, 18], pictures [count, H, W, 3]) of (seed, count, W, H)."""
    seed, count, width, height = job
    rng = random.Random(seed)
    numbers, labels, pictures = [], [], []
    for _ in range(count):
        scene = random_scene(rng)
        objects = layout(scene, rng, width, height)
        numbers.append(to_numbers(scene))
        labels.append(token_labels(objects, width, height))
        pictures.append(paint(scene, objects, width, height))
    return numbers, np.stack(labels), np.stack(pictures)


class LatentSet:
    """Latents with the scenes they show, from `write_latents`' file."""

    def __init__(self, path: Path) -> None:
        tensors = read_state_dict(path)
        sizes = sorted({name.split("/")[0] for name in tensors if name.endswith("/tokens")})
        if not sizes:
            raise ValueError(f"{path.name} is no file of latents; run the stage data again")
        self.parts = [
            {name: tensors[f"{size}/{name}"] for name in ("latents", "scenes", "tokens")} for size in sizes
        ]
        self.weights = [len(part["latents"]) for part in self.parts]

    def batch(self, size: int, rng: random.Random, empty_share: float) -> LatentBatch:
        """(latents [size, 16, h, w] float32, captions, token labels uint8 [size, N, 18]), at random.

        All of one size. Each caption tells what `world.told` chooses; some are empty, for guidance.
        """
        part = rng.choices(self.parts, self.weights)[0]
        picks = [rng.randrange(len(part["latents"])) for _ in range(size)]
        captions = []
        for row in part["scenes"][picks].tolist():
            captions.append("" if rng.random() < empty_share else caption(told(from_numbers(row), rng), rng))
        return LatentBatch(part["latents"][picks].float(), captions, part["tokens"][picks])
