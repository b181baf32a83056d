"""Guidance distillation: two passes of classifier-free guidance learned into one, as FLUX.1 [dev] has it.

Meng et al. 2023, arXiv:2210.03142, section 3.1, for a velocity: the student with its guidance embedder learns
to predict, in one pass, v_empty + g (v_prompt - v_empty) of the undistilled teacher, for any g in a range.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.spec import Conditioning
from ..model.text_encoders import TextEncoders
from ..model.transformer import FluxTransformer
from .checkpoint import TrainingState, WeightAverage
from .data import CaptionedLatents
from .flow import draw_sigmas, predict_velocity
from .loop import (
    Losses,
    Recipe,
    TrainingRun,
    autocast,
    compiled,
    concat_text,
    descend,
    device,
    make_optimizers,
    repeat_text,
    train,
)


@dataclass(frozen=True)
class GuidanceRecipe(Recipe):
    """Settings of guidance distillation: the range of scales, and the share of empty prompts."""

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
    both = noisy.repeat(2, 1, 1, 1), sigmas.repeat(2), concat_text(text, empty)
    velocities = predict_velocity(teacher, *both)
    prompted, unprompted = velocities.chunk(2)
    return unprompted + g[:, None, None, None] * (prompted - unprompted)


class GuidanceLoss(nn.Module):
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
            target = guided_teacher(self.teacher, noisy, sigmas, text, empty, g)
        return F.mse_loss(predict_velocity(self.student, noisy, sigmas, text, g), target)


def with_guidance(teacher: FluxTransformer) -> FluxTransformer:
    """A copy of the teacher with a guidance embedder that has no effect yet.

    Raises ValueError when the teacher has one already.
    """
    if teacher.spec.guidance_embed:
        raise ValueError(
            "guidance distillation needs an undistilled teacher, this one has a guidance embedder"
        )
    student = FluxTransformer(replace(teacher.spec, guidance_embed=True))
    student.load_state_dict(teacher.state_dict(), strict=False)
    assert student.guidance_in is not None
    nn.init.zeros_(student.guidance_in.out_layer.weight)
    nn.init.zeros_(student.guidance_in.out_layer.bias)
    return student


def train_guidance(
    run: TrainingRun,
    data: CaptionedLatents,
    encoders: TextEncoders,
    teacher: FluxTransformer,
    recipe: GuidanceRecipe = GuidanceRecipe(),
) -> None:
    """Distill the teacher's guidance and write run.out; see loop.train for resuming and errors."""
    rng = run.seeded()
    student = with_guidance(teacher)
    loss_of = compiled(GuidanceLoss(student, teacher).to(device()), recipe)
    optimizers = make_optimizers(student, recipe)
    no_prompt = encoders.encode([""])

    def update() -> Losses:
        images, captions, _ = data.batch(recipe.batch, rng, recipe.empty_share)
        sigmas, noise = draw_sigmas(recipe.batch), torch.randn_like(images)
        s = sigmas[:, None, None, None]
        scales = recipe.lowest + (recipe.highest - recipe.lowest) * torch.rand(recipe.batch)
        noisy = ((1 - s) * images + s * noise).to(device())
        with autocast(recipe):
            text, empty = encoders.encode(captions), repeat_text(no_prompt, recipe.batch)
            loss = loss_of(noisy, sigmas.to(device()), text, empty, scales.to(device()))
        descend(loss, student, optimizers)
        return {"loss": loss.detach()}

    average = WeightAverage(student, recipe.average)
    train(run, recipe, TrainingState({"student": student}, optimizers, rng, average), update)
