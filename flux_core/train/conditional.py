"""Fine-tuning a model with distilled guidance to read images beside its prompt: Fill, Canny, Kontext.

The model predicts the velocity of the data, moved by its own guidance (Tang et al. 2025, arXiv:2502.12154,
"model guidance", for a velocity): with w = 1 - 1/g the target is

    noise - image + w (v(x, prompt, g) - v(x, no prompt)),

whose fixed point is classifier-free guidance of scale g, so that the guidance input keeps its meaning and one
pass is enough when sampling. Captions that are empty, and g = 1, train the plain velocity. So does a recipe
with `guided` False, at any guidance: an edit leaves little open, and training needs one pass less.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..model.spec import Conditioning
from ..model.text_encoders import TextEncoders
from ..model.transformer import FluxTransformer
from ..tools.kontext import with_references
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
    repeat_text,
    train,
)


class ImageBatch(NamedTuple):
    """Latents [B, 16, h, w] float32 in model space, a caption of each, and images that the model reads.

    `changed` [B, 1, h, w] is 1 where the error may count more. `extra` [B, c, h, w] are input channels beside
    the latent, `references` latents [B, 16, h', w'] of images behind it.
    """

    latents: Tensor
    captions: list[str]
    changed: Tensor
    extra: Tensor | None = None
    references: tuple[Tensor, ...] = ()


class ImageData(Protocol):
    """A data set of encoded images with captions and other images."""

    def batch(self, size: int, rng: random.Random, empty_share: float) -> ImageBatch:
        """A random batch, all of one size, in which about `empty_share` of the captions are empty."""
        ...


@dataclass(frozen=True)
class ConditionalRecipe(Recipe):
    """Settings: range of guidance scales, share of empty prompts, and the extra weight of changed pixels.

    With `change_weight` c the squared error of an element counts 1 + c where `ImageBatch.changed` is 1.
    """

    lr: float = 1e-3
    lowest: float = 1.0
    highest: float = 5.0
    empty_share: float = 0.1
    change_weight: float = 0.0
    guided: bool = True
    """Whether the target has guidance; False trains the plain velocity at any guidance."""


def with_input_channels(model: FluxTransformer, in_channels: int) -> FluxTransformer:
    """A copy of the model that reads tokens of `in_channels` values; the new ones have no effect yet.

    Raises ValueError for fewer channels than it has.
    """
    old = model.spec.in_channels
    if in_channels < old:
        raise ValueError(f"a model with {old} input channels cannot get {in_channels}; choose more")
    wider = FluxTransformer(replace(model.spec, in_channels=in_channels))
    state = dict(model.state_dict())
    weight = state["img_in.weight"]
    state["img_in.weight"] = torch.cat([weight, weight.new_zeros(len(weight), in_channels - old)], dim=1)
    wider.load_state_dict(state)
    return wider


def with_images(text: Conditioning, batch: ImageBatch) -> Conditioning:
    """The conditioning with a batch's `extra` channels and its references."""
    h, w = batch.latents.shape[-2:]
    if batch.extra is not None:
        text = replace(text, extra=batch.extra.to(device()))
    references = [latent.to(device()) for latent in batch.references]
    return with_references(text, references, h, w) if references else text


class ModelGuidanceLoss(nn.Module):
    """The loss of a batch of a model with a guidance embedder."""

    def __init__(self, model: FluxTransformer, change_weight: float = 0.0, guided: bool = True) -> None:
        super().__init__()
        self.model, self.change_weight, self.guided = model, change_weight, guided

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        sigmas: Tensor,
        prompts: tuple[Conditioning, Conditioning],
        guidance: Tensor,
        changed: Tensor,
    ) -> Tensor:
        """Weighted mean squared error, for latents and noise [B, 16, h, w], sigmas and guidance [B].

        `prompts` are the captions and the empty prompt, with the same images; `changed` [B, 1, h, w] is 1
        where the error counts more.
        """
        s, g = sigmas[:, None, None, None], guidance[:, None, None, None]
        noisy = (1 - s) * latents + s * noise
        velocity = predict_velocity(self.model, noisy, sigmas, prompts[0], guidance)
        target = noise - latents
        if self.guided:
            with torch.no_grad():
                plain = predict_velocity(self.model, noisy, sigmas, prompts[1], torch.ones_like(guidance))
                target = target + (1 - 1 / g) * (velocity - plain)
        weight = 1 + self.change_weight * changed
        return ((velocity - target).square() * weight).mean() / weight.mean()


def train_conditional(
    run: TrainingRun,
    data: ImageData,
    encoders: TextEncoders,
    model: FluxTransformer,
    recipe: ConditionalRecipe = ConditionalRecipe(),
) -> None:
    """Fine-tune `model` on data with images and write run.out; see loop.train for resuming and errors.

    Raises ValueError for a model without a guidance embedder.
    """
    if not model.spec.guidance_embed:
        raise ValueError("this training needs a model with a guidance embedder, such as [dev], got none")
    rng = run.seeded()
    loss_of = compiled(ModelGuidanceLoss(model, recipe.change_weight, recipe.guided).to(device()), recipe)
    optimizers = make_optimizers(model, recipe)
    no_prompt = encoders.encode([""])

    def update() -> Losses:
        batch = data.batch(recipe.batch, rng, recipe.empty_share)
        sigmas, noise = draw_sigmas(recipe.batch), torch.randn_like(batch.latents)
        guidance = recipe.lowest + (recipe.highest - recipe.lowest) * torch.rand(recipe.batch)
        empty = torch.tensor([not caption for caption in batch.captions])
        guidance = torch.where(empty, torch.ones(()), guidance)
        changed = batch.changed.to(device())
        with autocast(recipe):
            text = with_images(encoders.encode(batch.captions), batch)
            blank = with_images(repeat_text(no_prompt, recipe.batch), batch)
            inputs = (x.to(device()) for x in (batch.latents, noise, sigmas))
            loss = loss_of(*inputs, (text, blank), guidance.to(device()), changed)
        descend(loss, model, optimizers)
        return {"loss": loss.detach()}

    average = WeightAverage(model, recipe.average)
    train(run, recipe, TrainingState({"model": model}, optimizers, rng, average), update)
