"""The stage `decide`: seed conditioning, so that mini-schnell can generate an image in one step.

A one-step model averages over attributes that the prompt leaves unspecified, here the colors of objects.
mini-schnell derives them deterministically from the noise instead: the teacher's prompt states the color that
the noise determines, and the student learns the teacher's image from the caption that leaves it unspecified.
(The colors that the ODE itself makes of a noise are too intricate a function for one pass: a linear probe of
the noise predicts a quarter of them, and regression on such pairs learns a mixture.)

The rule (`with_seeded_colors`) is one that a single attention layer can compute. The means of two noise
channels over the image are a point in the plane; its angle selects a color on the color wheel, and a second
object gets the color opposite. The means are normally distributed, so every color is equally likely; and
where the network is uncertain between two colors they are neighbors on the wheel, whose mixture is still a
color. Of two objects the left or upper one is the first, because a caption may name them in either order.

The teacher is mini-schnell before this stage, sampled in four steps; each step of the student then learns the
teacher's image. No caption of the stage names a held-out combination, but some images show one: the
teacher's, which was never trained on any.

This is a coupling of noise and images chosen to be easy to learn, as that of Pooladian et al. 2023,
arXiv:2304.14772, is chosen to be short; distilling four steps into each one follows Salimans and Ho 2022,
arXiv:2202.00512, with the four at once.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..flux_core.model.spec import Conditioning
from ..flux_core.model.text_encoders import TextEncoders
from ..flux_core.model.transformer import FluxTransformer
from ..flux_core.train.checkpoint import TrainingState, WeightAverage
from ..flux_core.train.distribution_matching import STEPS, rollout
from ..flux_core.train.flow import predict_velocity
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
from ..flux_core.train.pairs import PairSet
from ..flux_core.train.reflow import pseudo_huber
from .caption import caption, plain_caption
from .scene import Item, Scene, random_scene, with_stated_attributes

UNSPECIFIED_SHARE = 0.75
"""Share of the stage's captions that state no color of an object."""


@dataclass(frozen=True)
class SeedConditioningRecipe(Recipe):
    """Settings: error where square turns to absolute, and how often a batch starts at each of the STEPS."""

    lr: float = 1e-3
    warmup: int = 20
    decay_share: float = 1.0
    average: float = 0.99
    huber: float = 0.03
    starts: tuple[int, ...] = (6, 1, 1, 1)


COLOR_WHEEL = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
"""The colors of objects around the color wheel, each beside those most similar to it."""
SECOND_OFFSET = 3
"""Distance on the wheel, in colors, of the second object's color from the first's."""


def with_seeded_colors(scene: Scene, noise: Tensor) -> Scene:
    """The scene with unspecified colors of objects set by noise [16, h, w].

    Held-out combinations (scene.HELD_OUT_PAIRS) can occur: excluding them here would teach that a shape
    never has its held-out color, and then not even a prompt that states it has an effect.
    """
    x, y = noise[:2].mean(dim=(1, 2)).tolist()
    sector = 2 * math.pi / len(COLOR_WHEEL)

    def colored(item: Item, offset: int) -> Item:
        angle = math.atan2(y, x) + offset * sector
        nearness = {n: math.cos(angle - k * sector) for k, n in enumerate(COLOR_WHEEL) if n != scene.without}
        found = max(nearness, key=lambda name: nearness[name])
        return item if item.color else replace(item, color=found)

    offsets = [0] * len(scene.items)
    if scene.kind == "pair":
        offsets[spatial_order(scene)[1]] = SECOND_OFFSET
    return replace(scene, items=tuple(map(colored, scene.items, offsets)))


def spatial_order(scene: Scene) -> list[int]:
    """Indices of the scene's distinct items, the left or upper one of two first."""
    places = list(range(len(scene.items)))
    if scene.kind != "pair":
        return places[:1]
    return places[::-1] if scene.relation in ("right", "below") else places


def underspecified_caption(rng: random.Random, share: float = UNSPECIFIED_SHARE) -> tuple[Scene, str]:
    """A scene and its caption, as random_caption's, but `share` of them state no color of an object."""
    scene = with_stated_attributes(random_scene(rng), rng)
    twins = scene.kind == "pair" and scene.items[0].shape == scene.items[1].shape
    if rng.random() < share and not twins:
        scene = replace(scene, items=tuple(replace(item, color=None) for item in scene.items))
    return scene, caption(scene, rng)


def fully_specified_caption(scene: Scene, noise: Tensor) -> str:
    """The teacher's prompt: the scene with the colors that the noise determines."""
    return plain_caption(with_seeded_colors(scene, noise))


class SeedConditioningLoss(nn.Module):
    """The student, and the loss of a batch."""

    def __init__(self, student: FluxTransformer, huber: float) -> None:
        super().__init__()
        self.student, self.huber = student, huber

    def forward(self, x: Tensor, sigma: Tensor, latents: Tensor, text: Conditioning) -> Tensor:
        """Pseudo-Huber error of `latents` as predicted from states x [B, 16, h, w] at sigma [B]."""
        denoised = x - sigma[:, None, None, None] * predict_velocity(self.student, x, sigma, text)
        return pseudo_huber(denoised - latents, self.huber)


def train_seed_conditioning(
    run: TrainingRun,
    pairs: PairSet,
    encoders: TextEncoders,
    student: FluxTransformer,
    recipe: SeedConditioningRecipe = SeedConditioningRecipe(),
) -> None:
    """Train `student` and write run.out; see train.loop for resuming and errors.

    `pairs` have captions that leave colors unspecified, and what the teacher generates from the same noise
    when the prompt states the colors that the noise determines.
    """
    rng = run.seeded()
    loss_of = compiled(SeedConditioningLoss(student, recipe.huber).to(device()), recipe)
    optimizers = make_optimizers(student, recipe)

    def update() -> Losses:
        noise, latents, captions = pairs.batch(recipe.batch, rng)
        text = encoders.encode(captions)
        with autocast(recipe):
            x, sigma = rollout(student, noise.to(device()), text, rng.choices(range(STEPS), recipe.starts)[0])
            loss = loss_of(x.float(), sigma, latents.to(device()), text)
        descend(loss, student, optimizers)
        return {"loss": loss.detach()}

    average = WeightAverage(student, recipe.average)
    train(run, recipe, TrainingState({"student": student}, optimizers, rng, average), update)
