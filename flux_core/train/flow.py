"""Training the miniature's transformer: rectified flow.

Liu et al. 2022, arXiv:2209.03003; its noise levels after Esser et al. 2024, arXiv:2403.03206.

The network learns the velocity noise - image at points (1 - sigma) image + sigma noise, with sigma
logit-normal, and a tutor teaches its middle what stands where. The text encoders and the autoencoder are
finished and frozen; pictures are encoded once, into a file of latents (data.py).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conditioning import TextEncoders
from ..spec import Conditioning, FluxSpec
from ..transformer import FluxTransformer, pack
from .checkpoint import (
    Average,
    ProgressLine,
    Smooth,
    load_checkpoint,
    refuse_nan,
    save_checkpoint,
    set_rate,
    write_safetensors,
)
from .data import CELLS, LatentSet
from .muon import Muon
from .world import COLOURS, SHAPES

MINI = FluxSpec(hidden_size=192, num_heads=3, depth=2, depth_single=5, context_in=192, vec_in=192)


@dataclass(frozen=True)
class Recipe:
    """Settings of a training."""

    batch: int = 32
    lr: float = 2e-3
    sigma_mean: float = 0.7
    sigma_std: float = 1.2
    uniform_share: float = 0.1
    empty_share: float = 0.1
    warmup: int = 200
    decay_share: float = 0.3
    average: float = 0.999
    lesson: float = 0.1


def draw_sigmas(count: int, recipe: Recipe) -> Tensor:
    """Noise levels [count] in (0, 1): logit-normal (arXiv:2403.03206, section 3.1), and some uniform.

    The logit-normal alone hardly reaches the ends, where sampling begins and ends.
    """
    normal = torch.sigmoid(recipe.sigma_mean + recipe.sigma_std * torch.randn(count))
    return torch.where(torch.rand(count) < recipe.uniform_share, torch.rand(count), normal)


class Tutor(nn.Module):
    """Reads from the network's middle what each image token is to show: a lesson, not a part of the model.

    After REPA (Yu et al. 2024, arXiv:2410.06940), which aligns a diffusion transformer's middle with the
    features of a picture encoder; here the world itself knows what stands where, so its own labels do.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.classes = (1 + len(SHAPES), 1 + len(COLOURS))
        self.read = nn.Linear(hidden, sum(self.classes) + CELLS * CELLS)

    def loss(self, states: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of shape, colour and coverage, of states [B, N, hidden], labels [B, N, 18]."""
        shape, colour, cover = self.read(states).float().split([*self.classes, CELLS * CELLS], dim=-1)
        return (
            F.cross_entropy(shape.flatten(0, 1), labels[..., 0].flatten().long())
            + F.cross_entropy(colour.flatten(0, 1), labels[..., 1].flatten().long())
            + F.binary_cross_entropy_with_logits(cover, labels[..., 2:].float() / 255)
        )


class Lesson(nn.Module):
    """The transformer with its tutor, and the two losses of a batch."""

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
        lesson = self.tutor.loss(x[:, txt.shape[1] :], labels)
        x = model.single_stream(x, modulations, rope, first=self.depth)
        velocity = model.final_layer(x[:, txt.shape[1] :], modulations.last)
        return F.mse_loss(velocity, pack(noise - latents)), lesson


def initialise(model: FluxTransformer) -> None:
    """adaLN-zero: every block starts as the identity, and the first velocity is zero."""
    for name, parameter in model.named_parameters():
        if "_mod.lin" in name or ".modulation.lin" in name or name.startswith("final_layer"):
            nn.init.zeros_(parameter)


def make_optimizers(
    model: nn.Module, lr: float, dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """Muon (in `dtype`) for the blocks' matrices, AdamW for modulations, embeddings, norms and biases."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        modulation = "_mod." in name or ".modulation." in name
        inner = parameter.ndim == 2 and "_blocks." in name and not modulation
        (matrices if inner else rest).append(parameter)
    return [
        Muon(matrices, lr, weight_decay=0.01, dtype=dtype),
        torch.optim.AdamW(rest, lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def rate(step: int, steps: int, recipe: Recipe) -> float:
    """Learning rate as a part of its peak: warm-up, plateau, linear descent over the last `decay_share`."""
    descent = (steps - step) / max(recipe.decay_share * steps, 1)
    return min(1.0, (step + 1) / recipe.warmup, descent)


def train_flow(
    out: Path,
    latents: Path,
    encoders: TextEncoders,
    steps: int,
    *,
    seed: int = 0,
    recipe: Recipe = Recipe(),
    spec: FluxSpec = MINI,
    save_every: int = 500,
    compiled: bool = True,
    bf16: bool = False,
) -> None:
    """Train for `steps` and write `out` (averaged weights). Resumes from `out`.checkpoint after a kill.

    The schedule's length is `steps`; giving a larger number on resuming lengthens the plateau, a smaller one
    begins the descent. `bf16` computes matrix products in bfloat16; weights and their average stay float32.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    data = LatentSet(latents)
    model = FluxTransformer(spec)
    initialise(model)
    lesson = Lesson(model)
    optimizers = make_optimizers(lesson, recipe.lr, torch.bfloat16 if bf16 else torch.float32)
    average = Average(model, recipe.average)
    checkpoint = out.with_name(out.name + ".checkpoint")
    step = 0
    if checkpoint.exists():
        step = load_checkpoint(checkpoint, {"model": lesson}, average, optimizers, rng)
    losses = torch.compile(lesson, dynamic=False) if compiled else lesson
    line, smooth = ProgressLine(steps, step), Smooth(2)
    while step < steps:
        set_rate(optimizers, recipe.lr * rate(step, steps, recipe))
        images, captions, labels = data.batch(recipe.batch, rng, recipe.empty_share)
        sigmas = draw_sigmas(recipe.batch, recipe)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            text = encoders.encode(captions)
            velocity, taught = losses(images, torch.randn_like(images), sigmas, text, labels)
            loss = velocity + recipe.lesson * taught
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lesson.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.update(model)
        step += 1
        refuse_nan(loss, step)
        smooth.update(velocity.item(), taught.item())
        if step % save_every == 0 or step == steps:
            write_safetensors(out, average.values, {"steps": str(step), "samples": str(step * recipe.batch)})
            save_checkpoint(checkpoint, step, {"model": lesson}, average, optimizers, rng)
        line.update(step, f"loss {smooth[0]:.4f}, lesson {smooth[1]:.3f}")
