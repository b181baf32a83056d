"""The stages' pairs of noise and image: which captions they have and how their teacher samples them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..flux_core.model.text_encoders import TextEncoders
from ..flux_core.model.transformer import FluxTransformer
from ..flux_core.pipeline import draw_noise
from ..flux_core.train import pairs
from ..flux_core.train.loop import device
from .data import IMAGE_SIZES, ImageSize, draw_size
from .evaluate import Sampling, generate_latents
from .scene import Scene
from .text_encoders import random_caption

TEACHER = Sampling(16, cfg_scale=3.5)
"""How the undistilled teacher samples the pairs of the stage `pairs`."""


@dataclass(frozen=True)
class PairRecipe:
    """How pairs are made.

    `draw_caption` returns a scene and its caption, which is kept with the pair; `teacher_prompt`, if given,
    maps the scene and its noise [16, h, w] to the prompt that the teacher gets instead. With `bf16` the
    teacher's matrix multiplications are in bfloat16, which changes its latents by 1.4 % of their spread.
    """

    sampling: Sampling = TEACHER
    draw_caption: Callable[[random.Random], tuple[Scene, str]] = random_caption
    teacher_prompt: Callable[[Scene, Tensor], str] | None = None
    sizes: Sequence[ImageSize] = IMAGE_SIZES
    seed: int = 0
    bf16: bool = False
    batch: int = 64
    chunk: int = pairs.CHUNK


def write_pairs(
    folder: Path,
    teacher: FluxTransformer,
    encoders: TextEncoders,
    count: int,
    recipe: PairRecipe = PairRecipe(),
) -> None:
    """Write `count` pairs to `folder`; see flux_core.train.pairs for their format and resuming."""
    empty = encoders.encode([""])

    def draw(k: int, size: int) -> pairs.PairInputs:
        seed = recipe.seed * 1_000_003 + k
        rng = random.Random(seed)
        width, height = draw_size(rng, recipe.sizes)
        scenes, captions = zip(*(recipe.draw_caption(rng) for _ in range(size)), strict=True)
        noise = draw_noise(seed, size, height // 8, width // 8)
        prompts = captions
        if recipe.teacher_prompt is not None:
            prompts = tuple(map(recipe.teacher_prompt, scenes, noise))
        return pairs.PairInputs(noise, captions, prompts)

    def generate(prompts: Sequence[str], noise: Tensor) -> Tensor:
        text = encoders.encode(list(prompts))
        with torch.autocast(device().type, torch.bfloat16, enabled=recipe.bf16):
            return generate_latents(teacher, text, empty, recipe.sampling, noise)

    pairs.write_pairs(folder, count, draw, generate, batch=recipe.batch, chunk=recipe.chunk)
