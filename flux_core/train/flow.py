"""Training a transformer as a rectified flow: the velocity objective, with a loss on hidden states beside it.

Liu et al. 2022, arXiv:2209.03003; noise levels after Esser et al. 2024, arXiv:2403.03206; the loss on hidden
states after REPA (Yu et al. 2024, arXiv:2410.06940).

The network learns the velocity noise - image at points (1 - sigma) image + sigma noise, with sigma
logit-normal. Text encoders and autoencoder are frozen; the data are latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.hooks import NO_HOOKS, Hooks, Tap
from ..model.layers import Shared
from ..model.spec import Conditioning
from ..model.text_encoders import TextEncoders
from ..model.transformer import Evaluation, FluxTransformer, pack, unpack
from .checkpoint import TrainingState, WeightAverage
from .data import CaptionedLatents
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


@dataclass(frozen=True)
class FlowRecipe(Recipe):
    """Settings of flow training; `repa_weight` is that of the loss on hidden states."""

    sigma_mean: float = 0.7
    sigma_std: float = 1.2
    uniform_share: float = 0.1
    empty_share: float = 0.1
    repa_weight: float = 0.1


def draw_sigmas(count: int, mean: float = 0.7, std: float = 1.2, uniform_share: float = 0.1) -> Tensor:
    """Noise levels [count] in (0, 1): logit-normal (arXiv:2403.03206, section 3.1), a share of them uniform.

    The logit-normal alone hardly reaches the ends, where sampling begins and ends.
    """
    normal = torch.sigmoid(mean + std * torch.randn(count))
    return torch.where(torch.rand(count) < uniform_share, torch.rand(count), normal)


def initialize(model: FluxTransformer) -> None:
    """adaLN-zero: every block starts as the identity, and the first velocity is zero."""
    for name, parameter in model.named_parameters():
        if "_mod.lin" in name or ".modulation.lin" in name or name.startswith("final_layer"):
            nn.init.zeros_(parameter)


def predict_velocity(
    model: FluxTransformer,
    noisy: Tensor,
    sigmas: Tensor,
    text: Conditioning,
    guidance: Tensor | None = None,
) -> Tensor:
    """Velocity [B, 16, h, w] of noisy latents of that shape, each with its own sigma [B] and guidance [B].

    Images that `text` is conditioned on (`extra`, `groups`) are inputs as in sampling.
    """
    h, w = noisy.shape[-2:]
    evaluation = evaluation_at(model, sigmas, text, (h, w), guidance)
    return unpack(model.run_blocks(image_tokens(model, noisy, text), evaluation), h, w)


def image_tokens(model: FluxTransformer, noisy: Tensor, text: Conditioning) -> Tensor:
    """Projected tokens [B, N + n, hidden] of noisy latents with `extra`, and of the groups behind them."""
    if text.extra is not None:
        noisy = torch.cat([noisy, text.extra.to(noisy).expand(len(noisy), -1, -1, -1)], dim=1)
    parts = [pack(noisy), *(group.tokens.expand(len(noisy), -1, -1) for group in text.groups)]
    return torch.cat([model.img_in(tokens.to(model.dtype)) for tokens in parts], dim=1)


def evaluation_at(
    model: FluxTransformer,
    sigmas: Tensor,
    text: Conditioning,
    size: tuple[int, int],
    guidance: Tensor | None = None,
    hooks: Hooks = NO_HOOKS,
) -> Evaluation:
    """The block loop's inputs for latents of `size` (h, w), each with its own sigma [B] and guidance [B]."""
    txt = model.project_text(text.txt)
    modulations = model.modulate(model.embed_time(sigmas, guidance, text.pooled))
    rope = model.rope(txt.shape[1], *size, text.groups)
    fixed = [group.sigma is not None for group in text.groups]
    references = tuple(
        (
            group.tokens.shape[1],
            modulations
            if group.sigma is None
            else model.modulate(
                model.embed_time(torch.full_like(sigmas, group.sigma), guidance, text.pooled)
            ),
        )
        for group in text.groups
    )
    # what is compiled uses the differentiable operations without gradients too: the compiler fuses them
    with torch.set_grad_enabled(torch.is_grad_enabled() or torch.compiler.is_compiling()):
        ops = model.ops()
    generated = size[0] * size[1] // 4
    return Evaluation(txt, modulations, Shared(rope, ops), hooks, references if any(fixed) else (), generated)


class FlowWithRepaLoss(nn.Module):
    """A transformer with a head on its image tokens after `depth` single blocks, and both losses of a batch.

    `head(states [B, N, hidden], labels [B, N, ...])` returns a loss. It is used in training only.
    """

    def __init__(self, model: FluxTransformer, head: nn.Module, depth: int = 2) -> None:
        super().__init__()
        self.model, self.head, self.depth = model, head, depth

    def forward(
        self, latents: Tensor, noise: Tensor, sigmas: Tensor, text: Conditioning, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(velocity's mean squared error over [B, N, 64], the head's loss) for latents [B, 16, h, w]."""
        s = sigmas[:, None, None, None]
        model, noisy = self.model, (1 - s) * latents + s * noise
        tap = Tap((("single", self.depth - 1),))
        size = latents.shape[-2], latents.shape[-1]
        evaluation = evaluation_at(model, sigmas, text, size, hooks=Hooks(blocks=(tap,)))
        velocity = model.run_blocks(image_tokens(model, noisy, text), evaluation)
        states = tap.states["single", self.depth - 1]
        repa = self.head(states[:, : labels.shape[1]], labels)
        return F.mse_loss(velocity, pack(noise - latents)), repa

    def checkpointed(self) -> nn.Module:
        """Model and head under the names that checkpoints have for them."""
        return nn.ModuleDict({"model": self.model, "tutor": self.head})


def train_flow(
    run: TrainingRun,
    data: CaptionedLatents,
    encoders: TextEncoders,
    build: Callable[[], FlowWithRepaLoss],
    recipe: FlowRecipe = FlowRecipe(),
) -> None:
    """Train what `build` returns and write run.out; see loop.train for resuming and errors.

    `build` is called once torch's generator is seeded, so that the seed determines initial weights too.
    """
    rng = run.seeded()
    flow = build().to(device())
    optimizers = make_optimizers(flow, recipe)
    losses_of = compiled(flow, recipe)

    def update() -> Losses:
        images, captions, labels = data.batch(recipe.batch, rng, recipe.empty_share)
        sigmas = draw_sigmas(recipe.batch, recipe.sigma_mean, recipe.sigma_std, recipe.uniform_share)
        noise = torch.randn_like(images)
        with autocast(recipe):
            text = encoders.encode(captions)
            inputs = (x.to(device()) for x in (images, noise, sigmas))
            velocity, repa = losses_of(*inputs, text, labels.to(device()))
            loss = velocity + recipe.repa_weight * repa
        descend(loss, flow, optimizers)
        return {"loss": velocity.detach(), "repa": repa.detach()}

    average = WeightAverage(flow.model, recipe.average)
    state = TrainingState({"lesson": flow.checkpointed()}, optimizers, rng, average)
    train(run, recipe, state, update)
