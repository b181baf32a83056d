"""The stage `schnell`: one to four steps, by matching the distribution of the guided teacher's pictures.

Yin et al. 2024, arXiv:2311.18828 and arXiv:2405.14867 (DMD2): the student's finished pictures are noised
again, and moved to where the teacher's score is higher than that of a critic, a network that is trained
beside the student on the student's pictures. In half of a batch pairs of the teacher's ODE (reflow.py) hold
the student to them meanwhile; the other half are noise and captions that nobody has seen. The student begins
as the reflow, keeps [schnell]'s wiring, and is trained at the sigmas of its four steps on states of its own
making, so that it meets in training what it meets in use.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...miniature.text_encoders import random_caption
from ..model.spec import Conditioning
from ..model.text_encoders import TextEncoders
from ..model.transformer import FluxTransformer
from ..sampling.schedule import make_sigmas
from .flow import draw_sigmas, predict
from .loop import Losses, Recipe, autocast, compiled, descend, device, make_optimizers, train
from .reflow import PairSet, fold_guidance, pseudo_huber

STEPS = 4
STARTS = (3, 1, 1, 1)
"""How often, in proportion, a lesson begins at each of them: one step to a picture has only the first."""


@dataclass(frozen=True)
class SchnellRecipe(Recipe):
    """Settings: the teacher's guidance, the weight of the pairs, and how often the critic learns."""

    lr: float = 5e-4
    guidance: float = 3.5
    pairs: float = 1.0
    huber: float = 0.1
    critic_updates: int = 2


class Matching(nn.Module):
    """Student, critic and frozen teacher, with the loss of either learner."""

    def __init__(self, student: FluxTransformer, critic: FluxTransformer, teacher: FluxTransformer) -> None:
        super().__init__()
        self.student, self.critic = student, critic
        self.teacher = teacher.requires_grad_(False)

    def student_loss(
        self, noisy: Tensor, start: Tensor, fresh: Tensor, sigmas: Tensor, text: Conditioning
    ) -> tuple[Tensor, Tensor]:
        """(distribution matching loss, denoised [B, 16, h, w]) of states `noisy` at sigmas `start` [B].

        The student's picture is noised again with `fresh` to `sigmas` [B]. The gradient at the picture is
        the critic's denoised minus the teacher's, over the teacher's distance (arXiv:2405.14867, eq. 1).
        """
        denoised = noisy - start[:, None, None, None] * predict(self.student, noisy, start, text)
        with torch.no_grad():
            s = sigmas[:, None, None, None]
            again = (1 - s) * denoised + s * fresh
            real = again - s * predict(self.teacher, again, sigmas, text)
            fake = again - s * predict(self.critic, again, sigmas, text)
            distance = (denoised - real).abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-3)
            wanted = denoised - (fake - real) / distance
        return 0.5 * F.mse_loss(denoised, wanted), denoised

    def critic_loss(self, pictures: Tensor, fresh: Tensor, sigmas: Tensor, text: Conditioning) -> Tensor:
        """Mean squared error of the critic's velocity on the student's pictures [B, 16, h, w]."""
        s = sigmas[:, None, None, None]
        velocity = predict(self.critic, (1 - s) * pictures + s * fresh, sigmas, text)
        return F.mse_loss(velocity, fresh - pictures)


@torch.no_grad()
def rollout(student: FluxTransformer, noise: Tensor, text: Conditioning, steps: int) -> tuple[Tensor, Tensor]:
    """(state [B, 16, h, w], sigma [B]) after `steps` of the student's STEPS Euler steps from noise."""
    sigmas = make_sigmas(STEPS, 1, shift="none").to(noise.device)
    x, batch = noise, noise.shape[0]
    for sigma, after in zip(sigmas[:steps], sigmas[1 : steps + 1], strict=True):
        x = x + (after - sigma) * predict(student, x, sigma.expand(batch), text)
    return x, sigmas[steps].expand(batch)


def train_schnell(
    out: Path,
    pairs: Path,
    encoders: TextEncoders,
    student: FluxTransformer,
    teacher: FluxTransformer,
    steps: int,
    *,
    seed: int = 0,
    recipe: SchnellRecipe = SchnellRecipe(),
    picture: Callable[[dict[str, Tensor]], np.ndarray] | None = None,
) -> None:
    """Train for `steps` and write `out` (averaged weights); see loop.train for resuming and errors.

    `student` is the reflow; `teacher` is guidance-distilled, and used at the recipe's scale.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    data = PairSet(pairs)
    teacher = fold_guidance(teacher, recipe.guidance)
    critic = FluxTransformer(teacher.spec)
    critic.load_state_dict(teacher.state_dict())
    matching = Matching(student, critic, teacher).to(device())
    dtype = torch.bfloat16 if recipe.bf16 else torch.float32
    optimizers = [make_optimizers(network, recipe.lr, dtype) for network in (student, critic)]
    student_loss = compiled(matching.student_loss, recipe)
    critic_loss = compiled(matching.critic_loss, recipe)

    def batch() -> tuple[Tensor, Tensor, Conditioning]:
        """Noise [batch, 16, h, w], the teacher's latents of its first half, and the texts of all of it."""
        noise, latents, captions = data.batch(recipe.batch // 2, rng)
        noise = torch.cat([noise, torch.randn(recipe.batch - len(noise), *noise.shape[1:])])
        captions += [random_caption(rng)[1] for _ in range(recipe.batch - len(captions))]
        return noise.to(device()), latents.to(device()), encoders.encode(captions)

    def teach_student(noise: Tensor, latents: Tensor, text: Conditioning) -> tuple[Tensor, Losses]:
        """The pictures that the student made, and its losses, after its update."""
        with autocast(recipe):
            x, sigma = rollout(student, noise, text, rng.choices(range(STEPS), STARTS)[0])
            sigmas = 0.02 + 0.96 * torch.rand(recipe.batch, device=device())
            matched, denoised = student_loss(x.float(), sigma, torch.randn_like(noise), sigmas, text)
            held = pseudo_huber(denoised[: len(latents)] - latents, recipe.huber)
            loss = matched + recipe.pairs * held
        descend(loss, student, optimizers[0])
        return denoised.detach().float(), {"loss": loss.detach(), "pairs": held.detach()}

    def teach_critic(pictures: Tensor, text: Conditioning) -> Tensor:
        """The critic's error, after its update."""
        with autocast(recipe):
            sigmas = draw_sigmas(recipe.batch).to(device())
            error = critic_loss(pictures, torch.randn_like(pictures), sigmas, text)
        descend(error, critic, optimizers[1])
        return error.detach()

    def update() -> Losses:
        noise, latents, text = batch()
        pictures, losses = teach_student(noise, latents, text)
        errors = [teach_critic(pictures, text) for _ in range(recipe.critic_updates)]
        return {**losses, "critic": torch.stack(errors).mean()}

    trained: dict[str, nn.Module] = {"student": student, "critic": critic}
    every = [optimizer for pair in optimizers for optimizer in pair]
    train(out, steps, student, trained, every, rng, recipe, update, picture)
