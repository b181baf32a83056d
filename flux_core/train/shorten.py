"""The stage `shorten`: the first of mini-schnell's four steps learns what all four of them paint.

Salimans and Ho 2022, arXiv:2202.00512, with four steps taken at once: the student is trained to predict, from
noise alone and from each later state of its own making, the picture that it painted from that noise in four
steps before the stage began. Such pairs are cheap, and near: their pictures are 0.23 of their spread from
what the first step gives alone, where the teacher's own pairs (reflow.py) are much further.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..conditioning import TextEncoders
from ..spec import Conditioning
from ..transformer import FluxTransformer
from .flow import predict
from .loop import Losses, Recipe, autocast, compiled, descend, device, make_optimizers, train
from .reflow import PairSet, pseudo_huber
from .schnell import STEPS, rollout


@dataclass(frozen=True)
class ShortenRecipe(Recipe):
    """Settings: where square turns to absolute error, and how often a lesson begins at each of the STEPS."""

    lr: float = 5e-4
    huber: float = 0.03
    starts: tuple[int, ...] = (6, 1, 1, 1)


class ShortenLesson(nn.Module):
    """The student, and the loss of a batch."""

    def __init__(self, student: FluxTransformer, turn: float) -> None:
        super().__init__()
        self.student, self.turn = student, turn

    def forward(self, x: Tensor, sigma: Tensor, latents: Tensor, text: Conditioning) -> Tensor:
        """Distance of the picture predicted from states x [B, 16, h, w] at sigma [B] from `latents`."""
        denoised = x - sigma[:, None, None, None] * predict(self.student, x, sigma, text)
        return pseudo_huber(denoised - latents, self.turn)


def train_shorten(
    out: Path,
    pairs: Path,
    encoders: TextEncoders,
    student: FluxTransformer,
    steps: int,
    *,
    seed: int = 0,
    recipe: ShortenRecipe = ShortenRecipe(),
    picture: Callable[[dict[str, Tensor]], np.ndarray] | None = None,
) -> None:
    """Train for `steps` and write `out` (averaged weights); see loop.train for resuming and errors.

    `pairs` are the student's own: noise, and what it paints of it in STEPS steps (reflow.write_pairs).
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    data = PairSet(pairs)
    lesson = ShortenLesson(student, recipe.huber).to(device())
    optimizers = make_optimizers(student, recipe.lr, torch.bfloat16 if recipe.bf16 else torch.float32)
    loss_of = compiled(lesson, recipe)

    def update() -> Losses:
        noise, latents, captions = data.batch(recipe.batch, rng)
        text = encoders.encode(captions)
        with autocast(recipe):
            x, sigma = rollout(student, noise.to(device()), text, rng.choices(range(STEPS), recipe.starts)[0])
            loss = loss_of(x.float(), sigma, latents.to(device()), text)
        descend(loss, student, optimizers)
        return {"loss": loss.detach()}

    train(out, steps, student, {"student": student}, optimizers, rng, recipe, update, picture)
