"""The stage `base`: the miniature's transformer learns a rectified flow.

Liu et al. 2022, arXiv:2209.03003; its noise levels after Esser et al. 2024, arXiv:2403.03206.

The network learns the velocity noise - image at points (1 - sigma) image + sigma noise, with sigma
logit-normal, and a tutor teaches its middle what stands where. The text encoders and the autoencoder are
finished and frozen; pictures are encoded once, into a file of latents (data.py).
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

from ...miniature.data import CELLS, LatentSet
from ...miniature.scene import COLOURS, SHAPES
from ..model.spec import Conditioning, FluxSpec
from ..model.text_encoders import TextEncoders
from ..model.transformer import FluxTransformer, pack, unpack
from .loop import Losses, Recipe, autocast, compiled, descend, device, make_optimizers, train

MINI = FluxSpec(hidden_size=192, num_heads=3, depth=2, depth_single=5, context_in=192, vec_in=192)


@dataclass(frozen=True)
class FlowRecipe(Recipe):
    """Settings of the base's training; `lesson` weighs the tutor's loss."""

    sigma_mean: float = 0.7
    sigma_std: float = 1.2
    uniform_share: float = 0.1
    empty_share: float = 0.1
    lesson: float = 0.1


def draw_sigmas(count: int, mean: float = 0.7, std: float = 1.2, uniform_share: float = 0.1) -> Tensor:
    """Noise levels [count] in (0, 1): logit-normal (arXiv:2403.03206, section 3.1), and some uniform.

    The logit-normal alone hardly reaches the ends, where sampling begins and ends.
    """
    normal = torch.sigmoid(mean + std * torch.randn(count))
    return torch.where(torch.rand(count) < uniform_share, torch.rand(count), normal)


def initialise(model: FluxTransformer) -> None:
    """adaLN-zero: every block starts as the identity, and the first velocity is zero."""
    for name, parameter in model.named_parameters():
        if "_mod.lin" in name or ".modulation.lin" in name or name.startswith("final_layer"):
            nn.init.zeros_(parameter)


def predict(
    model: FluxTransformer,
    noisy: Tensor,
    sigmas: Tensor,
    text: Conditioning,
    guidance: Tensor | None = None,
) -> Tensor:
    """Velocity [B, 16, h, w] of noisy latents of that shape, each at a sigma [B] of its own."""
    h, w = noisy.shape[-2:]
    txt = model.project_text(text.txt)
    modulations = model.modulate(model.embed_time(sigmas, guidance, text.pooled))
    tokens = model.blocks(pack(noisy), txt, modulations, model.rope(txt.shape[1], h, w))
    return unpack(tokens, h, w)


class Tutor(nn.Module):
    """Reads from the network's middle what each image token is to show: a lesson, not a part of the model.

    After REPA (Yu et al. 2024, arXiv:2410.06940), which aligns a diffusion transformer's middle with the
    features of a picture encoder; here the world itself knows what stands where, so its own labels do.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.classes = (1 + len(SHAPES), 1 + len(COLOURS))
        self.read = nn.Linear(hidden, sum(self.classes) + CELLS * CELLS)

    def forward(self, states: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of shape, colour and coverage, of states [B, N, hidden], labels uint8 [B, N, 18]."""
        shape, colour, cover = self.read(states).float().split([*self.classes, CELLS * CELLS], dim=-1)
        return (
            F.cross_entropy(shape.flatten(0, 1), labels[..., 0].flatten().long())
            + F.cross_entropy(colour.flatten(0, 1), labels[..., 1].flatten().long())
            + F.binary_cross_entropy_with_logits(cover, labels[..., 2:].float() / 255)
        )


class Lesson(nn.Module):
    """The transformer with its tutor, who reads after `depth` single blocks, and both losses of a batch."""

    def __init__(self, model: FluxTransformer, depth: int = 2) -> None:
        super().__init__()
        self.model, self.depth = model, depth
        self.tutor = Tutor(model.spec.hidden_size)

    def forward(
        self, latents: Tensor, noise: Tensor, sigmas: Tensor, text: Conditioning, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(velocity's mean squared error over [B, N, 64], tutor's loss) for latents [B, 16, h, w]."""
        s = sigmas[:, None, None, None]
        model, tokens = self.model, pack((1 - s) * latents + s * noise)
        txt = model.project_text(text.txt)
        modulations = model.modulate(model.embed_time(sigmas, None, text.pooled))
        rope = model.rope(txt.shape[1], *latents.shape[-2:])
        x = model.double_stream(tokens, txt, modulations, rope)
        x = model.single_stream(x, modulations, rope, stop=self.depth)
        lesson = self.tutor(x[:, txt.shape[1] :], labels)
        x = model.single_stream(x, modulations, rope, first=self.depth)
        velocity = model.final_layer(x[:, txt.shape[1] :], modulations.last)
        return F.mse_loss(velocity, pack(noise - latents)), lesson


def train_flow(
    out: Path,
    latents: Path,
    encoders: TextEncoders,
    steps: int,
    *,
    seed: int = 0,
    recipe: FlowRecipe = FlowRecipe(),
    spec: FluxSpec = MINI,
    picture: Callable[[dict[str, Tensor]], np.ndarray] | None = None,
) -> None:
    """Train for `steps` and write `out` (averaged weights); see loop.train for resuming and errors."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    data = LatentSet(latents)
    model = FluxTransformer(spec)
    initialise(model)
    lesson = Lesson(model).to(device())
    optimizers = make_optimizers(lesson, recipe.lr, torch.bfloat16 if recipe.bf16 else torch.float32)
    losses_of = compiled(lesson, recipe)

    def update() -> Losses:
        images, captions, labels = data.batch(recipe.batch, rng, recipe.empty_share)
        sigmas = draw_sigmas(recipe.batch, recipe.sigma_mean, recipe.sigma_std, recipe.uniform_share)
        noise = torch.randn_like(images)
        with autocast(recipe):
            text = encoders.encode(captions)
            inputs = (x.to(device()) for x in (images, noise, sigmas))
            velocity, taught = losses_of(*inputs, text, labels.to(device()))
            loss = velocity + recipe.lesson * taught
        descend(loss, lesson, optimizers)
        return {"loss": velocity.detach(), "lesson": taught.detach()}

    train(out, steps, model, {"lesson": lesson}, optimizers, rng, recipe, update, picture)
