"""Distribution matching: one to four steps whose images have the distribution of the guided teacher's.

Yin et al. 2024, arXiv:2311.18828 and arXiv:2405.14867 (DMD2): the student's output is noised again and moved
to where the teacher's score is higher than that of a critic, a network trained meanwhile on the student's
output. In half of a batch, pairs of the teacher's ODE (pairs.py) regularize the student; the other half are
fresh noise and prompts. The student starts from reflow, has no guidance embedder as [schnell], and is trained
at the sigmas of its four steps on states of its own making, so that training matches sampling.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.spec import Conditioning
from ..model.text_encoders import TextEncoders
from ..model.transformer import FluxTransformer
from ..sampling.schedule import make_sigmas
from .checkpoint import TrainingState, WeightAverage
from .flow import draw_sigmas, predict_velocity
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
from .reflow import fold_guidance, pseudo_huber

STEPS = 4
STARTS = (3, 1, 1, 1)
"""How often, in proportion, a batch starts at each of the STEPS: one-step sampling has only the first."""


@dataclass(frozen=True)
class MatchingRecipe(Recipe):
    """Settings: the teacher's guidance, the weight of the pairs, and the critic's updates per step."""

    lr: float = 5e-4
    guidance: float = 3.5
    pairs: float = 1.0
    huber: float = 0.1
    critic_updates: int = 2


@dataclass(frozen=True)
class MatchingData:
    """The teacher's pairs, and a function that draws a new prompt."""

    pairs: PairSet
    draw_prompt: Callable[[random.Random], str]


class DistributionMatching(nn.Module):
    """Student, critic and frozen teacher, with the losses of student and critic."""

    def __init__(self, student: FluxTransformer, critic: FluxTransformer, teacher: FluxTransformer) -> None:
        super().__init__()
        self.student, self.critic = student, critic
        self.teacher = teacher.requires_grad_(False)

    def student_loss(
        self, noisy: Tensor, start: Tensor, fresh: Tensor, sigmas: Tensor, text: Conditioning
    ) -> tuple[Tensor, Tensor]:
        """(distribution matching loss, denoised [B, 16, h, w]) of states `noisy` at sigmas `start` [B].

        The student's denoised latent is noised again with `fresh` to `sigmas` [B]. The gradient there is the
        critic's denoised minus the teacher's, over the teacher's distance (arXiv:2405.14867, eq. 1).
        """
        denoised = noisy - start[:, None, None, None] * predict_velocity(self.student, noisy, start, text)
        with torch.no_grad():
            s = sigmas[:, None, None, None]
            again = (1 - s) * denoised + s * fresh
            real = again - s * predict_velocity(self.teacher, again, sigmas, text)
            fake = again - s * predict_velocity(self.critic, again, sigmas, text)
            distance = (denoised - real).abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-3)
            target = denoised - (fake - real) / distance
        return 0.5 * F.mse_loss(denoised, target), denoised

    def critic_loss(self, latents: Tensor, fresh: Tensor, sigmas: Tensor, text: Conditioning) -> Tensor:
        """Mean squared error of the critic's velocity on the student's latents [B, 16, h, w]."""
        s = sigmas[:, None, None, None]
        velocity = predict_velocity(self.critic, (1 - s) * latents + s * fresh, sigmas, text)
        return F.mse_loss(velocity, fresh - latents)


@torch.no_grad()
def rollout(student: FluxTransformer, noise: Tensor, text: Conditioning, steps: int) -> tuple[Tensor, Tensor]:
    """(state [B, 16, h, w], sigma [B]) after `steps` of the student's STEPS Euler steps from noise."""
    sigmas = make_sigmas(STEPS, 1, shift="none").to(noise.device)
    x, batch = noise, noise.shape[0]
    for sigma, after in zip(sigmas[:steps], sigmas[1 : steps + 1], strict=True):
        x = x + (after - sigma) * predict_velocity(student, x, sigma.expand(batch), text)
    return x, sigmas[steps].expand(batch)


def train_distribution_matching(
    run: TrainingRun,
    data: MatchingData,
    encoders: TextEncoders,
    student: FluxTransformer,
    teacher: FluxTransformer,
    recipe: MatchingRecipe = MatchingRecipe(),
) -> None:
    """Train `student` and write run.out; see loop.train for resuming and errors.

    `student` has no guidance embedder; `teacher` is guidance-distilled, and used at recipe.guidance.
    """
    rng = run.seeded()
    teacher = fold_guidance(teacher, recipe.guidance)
    critic = FluxTransformer(teacher.spec)
    critic.load_state_dict(teacher.state_dict())
    matching = DistributionMatching(student, critic, teacher).to(device())
    optimizers = [make_optimizers(network, recipe) for network in (student, critic)]
    student_loss = compiled(matching.student_loss, recipe)
    critic_loss = compiled(matching.critic_loss, recipe)

    def batch() -> tuple[Tensor, Tensor, Conditioning]:
        """Noise [batch, 16, h, w], the teacher's latents of its first half, and the texts of all of it."""
        noise, latents, captions = data.pairs.batch(recipe.batch // 2, rng)
        noise = torch.cat([noise, torch.randn(recipe.batch - len(noise), *noise.shape[1:])])
        captions += [data.draw_prompt(rng) for _ in range(recipe.batch - len(captions))]
        return noise.to(device()), latents.to(device()), encoders.encode(captions)

    def update_student(noise: Tensor, latents: Tensor, text: Conditioning) -> tuple[Tensor, Losses]:
        """The student's denoised latents, and its losses before its update."""
        with autocast(recipe):
            x, sigma = rollout(student, noise, text, rng.choices(range(STEPS), STARTS)[0])
            sigmas = 0.02 + 0.96 * torch.rand(recipe.batch, device=device())
            matched, denoised = student_loss(x.float(), sigma, torch.randn_like(noise), sigmas, text)
            paired = pseudo_huber(denoised[: len(latents)] - latents, recipe.huber)
            loss = matched + recipe.pairs * paired
        descend(loss, student, optimizers[0])
        return denoised.detach().float(), {"loss": loss.detach(), "pairs": paired.detach()}

    def update_critic(latents: Tensor, text: Conditioning) -> Tensor:
        """The critic's error before its update."""
        with autocast(recipe):
            sigmas = draw_sigmas(recipe.batch).to(device())
            error = critic_loss(latents, torch.randn_like(latents), sigmas, text)
        descend(error, critic, optimizers[1])
        return error.detach()

    def update() -> Losses:
        noise, latents, text = batch()
        generated, losses = update_student(noise, latents, text)
        errors = [update_critic(generated, text) for _ in range(recipe.critic_updates)]
        return {**losses, "critic": torch.stack(errors).mean()}

    modules: dict[str, nn.Module] = {"student": student, "critic": critic}
    every = [optimizer for pair in optimizers for optimizer in pair]
    average = WeightAverage(student, recipe.average)
    train(run, recipe, TrainingState(modules, every, rng, average), update)
