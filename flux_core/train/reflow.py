"""Reflow: a flow trained on pairs that its guided teacher's own ODE makes, and so straightened.

Liu et al. 2022, arXiv:2209.03003, section 2.2; emphasis on both ends of the path and a loss between square
and absolute after Lee et al. 2024, arXiv:2405.20320. The student has no guidance embedder: the pairs already
contain the teacher's guidance, and the student starts as the guidance-distilled model at that scale.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..model.layers import sinusoidal_embedding
from ..model.spec import Conditioning
from ..model.text_encoders import TextEncoders
from ..model.transformer import FluxTransformer
from .checkpoint import TrainingState, WeightAverage
from .flow import predict_velocity
from .loop import (
    Losses,
    Recipe,
    TrainingRun,
    autocast,
    compiled,
    descend,
    device,
    make_optimizers,
    train,
)
from .pairs import PairSet


@dataclass(frozen=True)
class ReflowRecipe(Recipe):
    """Settings of reflow: `huber` is the root mean square error where square turns to absolute."""

    lr: float = 1e-3
    huber: float = 0.1


def fold_guidance(teacher: FluxTransformer, guidance: float) -> FluxTransformer:
    """The teacher at one guidance scale, as a network without a guidance embedder, [schnell]'s wiring.

    Exact: the embedding of a fixed scale is a constant, which is added to the bias of the pooled vector's
    embedder.
    """
    student = FluxTransformer(replace(teacher.spec, guidance_embed=False))
    student.load_state_dict(teacher.state_dict(), strict=False)
    if teacher.guidance_in is not None:
        with torch.no_grad():
            embedding = sinusoidal_embedding(torch.tensor([guidance], device=teacher.device))
            student.vector_in.out_layer.bias += teacher.guidance_in(embedding.to(teacher.dtype))[0].cpu()
    return student


def end_heavy_sigmas(count: int) -> Tensor:
    """Noise levels [count] in (0, 1] with a density that rises to both ends, most to noise.

    A tenth are exactly 1, where one-step sampling begins; else sigma = sin^2(pi u / 2), the arcsine law.
    """
    sigmas = torch.sin(torch.rand(count) * torch.pi / 2) ** 2
    return torch.where(torch.rand(count) < 0.1, torch.ones(()), sigmas.clamp(1e-3, 1.0))


def pseudo_huber(error: Tensor, c: float) -> Tensor:
    """Mean over the batch of sqrt(mean(error^2) + c^2) - c, for errors [B, ...] (arXiv:2310.14189)."""
    return ((error.float() ** 2).flatten(1).mean(dim=1) + c**2).sqrt().sub(c).mean()


class ReflowLoss(nn.Module):
    """The student, and the loss of a batch of pairs."""

    def __init__(self, student: FluxTransformer, huber: float) -> None:
        super().__init__()
        self.student, self.huber = student, huber

    def forward(self, latents: Tensor, noise: Tensor, sigmas: Tensor, text: Conditioning) -> Tensor:
        """Pseudo-Huber error of the velocity on the straight paths from `noise` to `latents`."""
        s = sigmas[:, None, None, None]
        velocity = predict_velocity(self.student, (1 - s) * latents + s * noise, sigmas, text)
        return pseudo_huber(velocity - (noise - latents), self.huber)


def train_reflow(
    run: TrainingRun,
    pairs: PairSet,
    encoders: TextEncoders,
    student: FluxTransformer,
    recipe: ReflowRecipe = ReflowRecipe(),
) -> None:
    """Train `student` on `pairs` and write run.out; see loop.train for resuming and errors."""
    rng = run.seeded()
    loss_of = compiled(ReflowLoss(student, recipe.huber).to(device()), recipe)
    optimizers = make_optimizers(student, recipe)

    def update() -> Losses:
        noise, latents, captions = pairs.batch(recipe.batch, rng)
        with autocast(recipe):
            inputs = (x.to(device()) for x in (latents, noise, end_heavy_sigmas(recipe.batch)))
            loss = loss_of(*inputs, encoders.encode(captions))
        descend(loss, student, optimizers)
        return {"loss": loss.detach()}

    average = WeightAverage(student, recipe.average)
    train(run, recipe, TrainingState({"student": student}, optimizers, rng, average), update)
