"""The stage `kontext`: mini-dev fine-tuned to edit an image by an instruction, as FLUX.1 Kontext does.

References are tokens behind the generated ones, placed by the method "offset" (tools.references). The flow is
that of flux_core.train.flow on the latents of the edited image. Most of that image is a copy of the input, so
that changed places count more in the loss; guidance is drawn at random and thus has little effect.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..flux_core.model.autoencoder import AutoEncoder, to_model_space, to_vae_space
from ..flux_core.model.spec import Conditioning, TokenGroup
from ..flux_core.model.text_encoders import TextEncoders
from ..flux_core.model.transformer import FluxTransformer, pack
from ..flux_core.pipeline import draw_noise, latent_size
from ..flux_core.tools.references import latent_ids, place_references
from ..flux_core.train.checkpoint import TrainingState, WeightAverage
from ..flux_core.train.flow import draw_sigmas, predict_velocity
from ..flux_core.train.loop import (
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
from .autoencoder import from_uint8, to_uint8
from .edits import SIDE, Edit, Picture, random_edit
from .evaluate import Sampling, generate_latents
from .pca import encode_linear, linear_code

SAMPLING = Sampling(28, guidance=3.5)
"""The settings that mini-kontext is meant for."""
CELL = 8
"""Pixels along the side of a latent's square."""
VISIBLE = 4
"""Largest difference of a place that counts as unchanged, in levels of 255: a shadow's faint end is one."""


class EditBatch(NamedTuple):
    """Edited latents [B, 16, h, w] in model space, references of that shape, instructions, changed places.

    `changed` [B, 1, h, w] is 1 where the edited image visibly differs from the first reference, else 0.
    """

    latents: Tensor
    references: tuple[Tensor, ...]
    instructions: list[str]
    changed: Tensor


@dataclass(frozen=True)
class KontextRecipe(Recipe):
    """Settings: range of guidance, share of batches with two references, extra weight of changed places.

    The squared error of an element counts 1 + `change_weight` where the image changes.
    """

    lr: float = 1.5e-3
    warmup: int = 20
    average: float = 0.995
    lowest: float = 1.0
    highest: float = 5.0
    two_references: float = 0.1
    change_weight: float = 3.0


def with_references(text: Conditioning, references: Sequence[Tensor]) -> Conditioning:
    """The prompt with references [B, 16, h, w] in model space behind latents of the first one's size."""
    h, w = references[0].shape[-2:]
    placed = place_references([latent.shape[-2:] for latent in references], h, w, "offset")
    groups = tuple(
        TokenGroup(pack(latent), latent_ids(*latent.shape[-2:], at))
        for latent, at in zip(references, placed, strict=True)
    )
    return replace(text, groups=groups)


class EditData:
    """Random edits, drawn as they are asked for and encoded by a linear encoder (pca.set_pca_encoder)."""

    def __init__(self, vae: AutoEncoder) -> None:
        self.code = linear_code(vae)

    def encode(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Latents [B, 16, h, w] in model space of images uint8 [H, W, 3]."""
        return to_model_space(encode_linear(from_uint8(np.stack(pictures)), self.code))

    def references(self, edits: Sequence[Edit]) -> tuple[Tensor, ...]:
        """The edits' references, first ones and second ones; all edits must have equally many."""
        columns: list[tuple[Picture, ...]] = list(zip(*(edit.references for edit in edits), strict=True))
        return tuple(self.encode([picture.render() for picture in column]) for column in columns)

    def batch(self, size: int, rng: random.Random, two_references: float = 0.0) -> EditBatch:
        """Random edits; the share `two_references` of batches has two references."""
        kind = "two references" if rng.random() < two_references else None
        edits = [random_edit(rng, kind) for _ in range(size)]
        after = np.stack([edit.after.render() for edit in edits])
        before = np.stack([edit.references[0].render() for edit in edits])
        differs = np.abs(after.astype(np.int16) - before).max(axis=-1) > VISIBLE
        changed = nn.functional.max_pool2d(torch.from_numpy(differs).float()[:, None], CELL)
        instructions = [edit.instruction for edit in edits]
        return EditBatch(self.encode(list(after)), self.references(edits), instructions, changed)


class EditLoss(nn.Module):
    """The weighted velocity loss of a batch."""

    def __init__(self, model: FluxTransformer, change_weight: float) -> None:
        super().__init__()
        self.model, self.change_weight = model, change_weight

    def forward(
        self, latents: Tensor, noise: Tensor, levels: Tensor, text: Conditioning, changed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(weighted mean squared error, that of changed places alone) of latents and noise [B, 16, h, w].

        `levels` [2, B] are sigmas and guidance, `changed` [B, 1, h, w].
        """
        sigmas, guidance = levels
        s = sigmas[:, None, None, None]
        velocity = predict_velocity(self.model, (1 - s) * latents + s * noise, sigmas, text, guidance)
        error = (velocity - noise + latents).square().mean(dim=1, keepdim=True)
        weight = 1 + self.change_weight * changed
        inside = (error * changed).sum() / changed.sum().clamp(min=1)
        return (error * weight).sum() / weight.sum(), inside.detach()


def train_kontext(
    run: TrainingRun,
    data: EditData,
    encoders: TextEncoders,
    model: FluxTransformer,
    recipe: KontextRecipe = KontextRecipe(),
) -> None:
    """Fine-tune `model` to edit and write run.out; see train.loop for resuming and errors.

    Raises ValueError for a model without a guidance embedder.
    """
    if not model.spec.guidance_embed:
        raise ValueError("mini-kontext is trained from a model with a guidance embedder (mini-dev), got none")
    rng = run.seeded()
    model = model.to(device())
    loss_of = compiled(EditLoss(model, recipe.change_weight), recipe)
    optimizers = make_optimizers(model, recipe)

    def update() -> Losses:
        batch = data.batch(recipe.batch, rng, recipe.two_references)
        guidance = recipe.lowest + (recipe.highest - recipe.lowest) * torch.rand(recipe.batch)
        levels = torch.stack([draw_sigmas(recipe.batch), guidance]).to(device())
        latents, changed = batch.latents.to(device()), batch.changed.to(device())
        noise = torch.randn_like(batch.latents).to(device())
        references = [latent.to(device()) for latent in batch.references]
        with autocast(recipe):
            text = with_references(encoders.encode(batch.instructions), references)
            loss, inside = loss_of(latents, noise, levels, text, changed)
        descend(loss, model, optimizers)
        return {"loss": loss.detach(), "changed": inside}

    average = WeightAverage(model, recipe.average)
    train(run, recipe, TrainingState({"model": model}, optimizers, rng, average), update)


@torch.no_grad()
def edit_images(
    transformer: FluxTransformer,
    encoders: TextEncoders,
    vae: AutoEncoder,
    edits: Sequence[Edit],
    sampling: Sampling = SAMPLING,
    *,
    seed: int = 0,
) -> list[np.ndarray]:
    """An image uint8 [SIDE, SIDE, 3] of each edit, in one batch; all must have equally many references.

    References are encoded by the autoencoder, as a user's image would be.
    """
    columns = zip(*(edit.references for edit in edits), strict=True)
    images = [from_uint8(np.stack([picture.render() for picture in column])) for column in columns]
    references = [to_model_space(vae.encode(image.to(device()))) for image in images]
    text = with_references(encoders.encode([edit.instruction for edit in edits]), references)
    noise = draw_noise(seed, len(edits), *latent_size(SIDE, SIDE))
    latents = generate_latents(transformer, text, text, sampling, noise)
    return list(to_uint8(vae.decode(to_vae_space(latents)).cpu()))
