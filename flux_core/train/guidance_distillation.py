"""The stage `guidance`: two passes of classifier-free guidance learned into one, as FLUX.1 [dev] has it.

Meng et al. 2023, arXiv:2210.03142, section 3.1, for a velocity: the student with its guidance embedder is
trained to give, in one pass, v_empty + g (v_prompt - v_empty) of the undistilled teacher, for any g in a
range.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...miniature.data import LatentSet
from ..model.spec import Conditioning
from ..model.text_encoders import TextEncoders
from ..model.transformer import FluxTransformer
from .flow import draw_sigmas, predict
from .loop import Losses, Recipe, autocast, compiled, descend, device, make_optimizers, repeat_text, train


@dataclass(frozen=True)
class GuidanceRecipe(Recipe):
    """Settings of guidance distillation: the range of scales, and how often the prompt is empty."""

    lr: float = 1e-3
    lowest: float = 1.0
    highest: float = 6.0
    empty_share: float = 0.05


def guided_teacher(
    teacher: FluxTransformer,
    noisy: Tensor,
    sigmas: Tensor,
    text: Conditioning,
    empty: Conditioning,
    g: Tensor,
) -> Tensor:
    """Velocity [B, 16, h, w] of classifier-free guidance (arXiv:2207.12598, equation 6) with scales g [B].

    Both passes go through the teacher as one batch.
    """
    both = Conditioning(torch.cat([text.txt, empty.txt]), torch.cat([text.pooled, empty.pooled]))
    prompted, unprompted = predict(teacher, noisy.repeat(2, 1, 1, 1), sigmas.repeat(2), both).chunk(2)
    return unprompted + g[:, None, None, None] * (prompted - unprompted)


class GuidanceLesson(nn.Module):
    """Student and frozen teacher, and the loss of a batch."""

    def __init__(self, student: FluxTransformer, teacher: FluxTransformer) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False)

    def forward(
        self, noisy: Tensor, sigmas: Tensor, text: Conditioning, empty: Conditioning, g: Tensor
    ) -> Tensor:
        """Mean squared error of the student's velocity, for noisy latents [B, 16, h, w] and scales g [B]."""
        with torch.no_grad():
            wanted = guided_teacher(self.teacher, noisy, sigmas, text, empty, g)
        return F.mse_loss(predict(self.student, noisy, sigmas, text, g), wanted)


def with_guidance(teacher: FluxTransformer) -> FluxTransformer:
    """A copy of the teacher with a guidance embedder that does nothing yet.

    Raises ValueError when the teacher has one already.
    """
    if teacher.spec.guidance_embed:
        raise ValueError("the teacher of guidance must be undistilled, this one has a guidance embedder")
    student = FluxTransformer(replace(teacher.spec, guidance_embed=True))
    student.load_state_dict(teacher.state_dict(), strict=False)
    assert student.guidance_in is not None
    nn.init.zeros_(student.guidance_in.out_layer.weight)
    nn.init.zeros_(student.guidance_in.out_layer.bias)
    return student


def train_guidance(
    out: Path,
    latents: Path,
    encoders: TextEncoders,
    teacher: FluxTransformer,
    steps: int,
    *,
    seed: int = 0,
    recipe: GuidanceRecipe = GuidanceRecipe(),
    picture: Callable[[dict[str, Tensor]], np.ndarray] | None = None,
) -> None:
    """Train for `steps` and write `out` (averaged weights); see loop.train for resuming and errors."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    data = LatentSet(latents)
    student = with_guidance(teacher)
    lesson = GuidanceLesson(student, teacher).to(device())
    optimizers = make_optimizers(student, recipe.lr, torch.bfloat16 if recipe.bf16 else torch.float32)
    loss_of = compiled(lesson, recipe)
    nothing = encoders.encode([""])

    def update() -> Losses:
        images, captions, _ = data.batch(recipe.batch, rng, recipe.empty_share)
        sigmas, noise = draw_sigmas(recipe.batch), torch.randn_like(images)
        s = sigmas[:, None, None, None]
        scales = recipe.lowest + (recipe.highest - recipe.lowest) * torch.rand(recipe.batch)
        noisy = ((1 - s) * images + s * noise).to(device())
        with autocast(recipe):
            text, empty = encoders.encode(captions), repeat_text(nothing, recipe.batch)
            loss = loss_of(noisy, sigmas.to(device()), text, empty, scales.to(device()))
        descend(loss, student, optimizers)
        return {"loss": loss.detach()}

    train(out, steps, student, {"student": student}, optimizers, rng, recipe, update, picture)
