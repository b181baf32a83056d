"""The stage `decide`: mini-schnell reads in the noise what a caption leaves open, to paint in one step.

Where a caption leaves a colour open, the ODE makes it of the noise by a function too intricate for one pass:
a linear reading of the noise guesses a quarter of the colours that four steps settle on, and regression on
such pairs learns their mixture. So it is laid down beforehand what a noise stands for, by a function that one
layer of attention computes: the means of two channels over the picture, a point whose angle names an object's
colour on the colour wheel; a second object has the colour that stands opposite. The means are normal, so that
every open colour stays as likely as any other; and where the network wavers between two colours they are
neighbours on the wheel, whose mixture is still a colour, not the mud of opposite ones. It must be the picture
that tells which of two objects is the first, not the caption, which may name either first: it is the left or
the upper one. mini-schnell, as it was, paints the noise in four steps with all of this told, which it does
best; then each of its steps learns to make that picture of the caption that leaves it open. No caption of
the stage names a held-out combination, but some pictures show one: mini-schnell's own, which never saw any.

It is a coupling of noise and pictures, chosen to be easily learned as that of Pooladian et al. 2023,
arXiv:2304.14772, is chosen to be short; that each step learns what four paint is Salimans and Ho 2022,
arXiv:2202.00512, with the four taken at once.
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
from .caption import caption, plain
from .scene import Item, Scene, random_scene, told

OPEN = 0.75
"""Share of the stage's captions that tell no colour of an object."""


@dataclass(frozen=True)
class DecideRecipe(Recipe):
    """Settings: where square turns to absolute error, and how often a lesson begins at each of the STEPS."""

    lr: float = 1e-3
    warmup: int = 20
    decay_share: float = 1.0
    average: float = 0.99
    huber: float = 0.03
    starts: tuple[int, ...] = (6, 1, 1, 1)


WHEEL = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
"""The colours of objects around the colour wheel, each next to those that it is most easily taken for."""
OPPOSITE = 3
"""How many colours further on the wheel a second object stands."""


def decided(scene: Scene, noise: Tensor) -> Scene:
    """The scene with every colour of an object that it leaves open set by noise [16, h, w].

    Held-out combinations (world.HELD_OUT_PAIRS) among them: barring a colour to a shape here teaches that the
    shape never has it, and then not even the words bring it about.
    """
    x, y = noise[:2].mean(dim=(1, 2)).tolist()
    turn = 2 * math.pi / len(WHEEL)

    def coloured(item: Item, further: int) -> Item:
        angle = math.atan2(y, x) + further * turn
        nearness = {n: math.cos(angle - k * turn) for k, n in enumerate(WHEEL) if n != scene.without}
        found = max(nearness, key=lambda name: nearness[name])
        return item if item.colour else replace(item, colour=found)

    further = [0] * len(scene.items)
    if scene.kind == "pair":
        further[in_order(scene)[1]] = OPPOSITE
    return replace(scene, items=tuple(map(coloured, scene.items, further)))


def in_order(scene: Scene) -> list[int]:
    """Places in the scene's items of the different ones, the left or upper one of two first."""
    places = list(range(len(scene.items)))
    if scene.kind != "pair":
        return places[:1]
    return places[::-1] if scene.relation in ("right", "below") else places


def open_caption(rng: random.Random, share: float = OPEN) -> tuple[Scene, str]:
    """A told scene and its caption, as random_caption's, but `share` of them tell no colour of an object."""
    scene = told(random_scene(rng), rng)
    twins = scene.kind == "pair" and scene.items[0].shape == scene.items[1].shape
    if rng.random() < share and not twins:
        scene = replace(scene, items=tuple(replace(item, colour=None) for item in scene.items))
    return scene, caption(scene, rng)


def full_caption(scene: Scene, noise: Tensor) -> str:
    """What the painter of the pairs is told: the scene with what the noise decides."""
    return plain(decided(scene, noise))


class DecideLesson(nn.Module):
    """The student, and the loss of a batch."""

    def __init__(self, student: FluxTransformer, turn: float) -> None:
        super().__init__()
        self.student, self.turn = student, turn

    def forward(self, x: Tensor, sigma: Tensor, latents: Tensor, text: Conditioning) -> Tensor:
        """Distance of the picture predicted from states x [B, 16, h, w] at sigma [B] from `latents`."""
        denoised = x - sigma[:, None, None, None] * predict_velocity(self.student, x, sigma, text)
        return pseudo_huber(denoised - latents, self.turn)


def train_decide(
    run: TrainingRun,
    pairs: PairSet,
    encoders: TextEncoders,
    student: FluxTransformer,
    recipe: DecideRecipe = DecideRecipe(),
) -> None:
    """Train `student` and write run.out; see train.loop for resuming and errors.

    `pairs` have captions that leave colors unspecified, and what the teacher generates from the same noise
    when the prompt states the colors that the noise determines.
    """
    rng = run.seeded()
    lesson = DecideLesson(student, recipe.huber).to(device())
    optimizers = make_optimizers(student, recipe)
    loss_of = compiled(lesson, recipe)

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
