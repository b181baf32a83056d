"""The stage `reading`: the front of mini-schnell learns to read in the noise what decide.py lays down in it.

A tutor, as that of the base (flow.py): what the same network, as it was, makes of the noise when the colours
are told is what its image tokens are to be (FitNets, Romero et al. 2014, arXiv:1412.6550), and readers ask
for the colours. It costs half as much as a lesson in pictures, and teaches in minutes what those alone teach
in an hour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flux_core.model.hooks import Finished, Hooks, Place, RunBlock, Streams
from ..flux_core.model.spec import Conditioning
from ..flux_core.model.text_encoders import TextEncoders
from ..flux_core.model.transformer import FluxTransformer, pack
from ..flux_core.train.checkpoint import TrainingState, WeightAverage
from ..flux_core.train.flow import evaluation_at
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
from .data import IMAGE_SIZES, ImageSize, draw_size
from .scene import COLOURS, Scene
from .seed_conditioning import decided, full_caption, in_order, open_caption

OPEN = 0.85
"""Share of the captions that tell no colour of an object."""


@dataclass(frozen=True)
class ReadRecipe(Recipe):
    """Settings: a constant rate, and hardly an average."""

    lr: float = 2e-3
    warmup: int = 30
    decay_share: float = 0.0
    average: float = 0.9
    sizes: tuple[ImageSize, ...] = IMAGE_SIZES


def open_colours(scenes: Sequence[Scene], noise: Tensor) -> Tensor:
    """What noise [B, 16, h, w] decides: indices [B, 2] of COLOURS, the left or upper object's first.

    -100, which cross_entropy ignores, where nothing is open.
    """
    labels = torch.full((len(scenes), 2), -100)
    for row, scene, each in zip(labels, scenes, noise, strict=True):
        found = decided(scene, each)
        for label, place in enumerate(in_order(scene)):
            if scene.items[place].colour is None:
                row[label] = list(COLOURS).index(str(found.items[place].colour))
    return labels


class Tutor(nn.Module):
    """The student's front, what it is to become, and four readers of what the noise decides.

    They read after the double blocks and after one single block, each from the mean of the text tokens and
    from every image token. Beside their cross-entropy counts how far the image tokens are from those of the
    teacher, which is told the colours.
    """

    def __init__(self, student: FluxTransformer, teacher: FluxTransformer) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)
        width = student.spec.hidden_size
        self.readers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * len(COLOURS))) for _ in range(4)
        )

    def forward(self, noise: Tensor, text: Conditioning, full: Conditioning, labels: Tensor) -> Tensor:
        """Loss of noise [B, 16, h, w] and labels [B, 2]; `full` is the text that tells the colours."""
        with torch.no_grad():
            wanted = _front(self.teacher, noise, full)
        found = _front(self.student, noise, text)
        seen = [states for txt, img in found for states in (txt.mean(dim=1, keepdim=True), img)]
        readers = zip(self.readers, seen, strict=True)
        reading = torch.stack([_error(reader(states), labels) for reader, states in readers]).mean()
        (_, double), (_, single) = found
        (_, double_told), (_, single_told) = wanted
        return reading + _distance(double, double_told) + _distance(single, single_told)


def _front(model: FluxTransformer, noise: Tensor, text: Conditioning) -> list[tuple[Tensor, Tensor]]:
    """Text and image tokens of pure noise after the double blocks, and after one single block more."""
    states: list[tuple[Tensor, Tensor]] = []

    def tap(at: Place, streams: Streams, block: RunBlock) -> Streams | Finished:
        out, length = block(streams), at.txt_length
        if at.kind == "double":
            return out
        states.extend((x[:, :length], x[:, length:]) for x in (streams.img, out.img))
        return Finished(at.image(out))

    ones = torch.ones(len(noise), device=noise.device)
    size = noise.shape[-2], noise.shape[-1]
    evaluation = evaluation_at(model, ones, text, size, hooks=Hooks(blocks=(tap,)))
    model.run_blocks(model.img_in(pack(noise).to(model.dtype)), evaluation)
    return states


def _error(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, N, 2 * colours] against labels [B, 2], the same for all N."""
    each = logits.float().unflatten(-1, (2, len(COLOURS)))
    return F.cross_entropy(each.flatten(0, 2), labels[:, None].expand(each.shape[:3]).flatten())


def _distance(states: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of states [B, N, hidden], each token normalised."""
    first, other = (F.layer_norm(x.float(), x.shape[-1:]) for x in (states, wanted))
    return F.mse_loss(first, other)


def train_reading(
    run: TrainingRun,
    encoders: TextEncoders,
    student: FluxTransformer,
    recipe: ReadRecipe = ReadRecipe(),
) -> None:
    """Distill the front of `student` and write run.out; see train.loop for resuming and errors."""
    rng = run.seeded()
    teacher = FluxTransformer(student.spec)
    teacher.load_state_dict(student.state_dict())
    tutor = Tutor(student, teacher).to(device())
    optimizers = make_optimizers(tutor, recipe)
    loss_of = compiled(tutor, recipe)

    def update() -> Losses:
        width, height = draw_size(rng, recipe.sizes)
        noise = torch.randn(recipe.batch, 16, height // 8, width // 8)
        scenes, captions = zip(*(open_caption(rng, OPEN) for _ in range(recipe.batch)), strict=True)
        text = encoders.encode(list(captions))
        full = encoders.encode(list(map(full_caption, scenes, noise)))
        labels = open_colours(scenes, noise)
        with autocast(recipe):
            loss = loss_of(noise.to(device()), text, full, labels.to(device()))
        descend(loss, tutor, optimizers)
        return {"loss": loss.detach()}

    modules = {"student": student, "readers": tutor.readers}
    state = TrainingState(modules, optimizers, rng, WeightAverage(student, recipe.average))
    train(run, recipe, state, update)
