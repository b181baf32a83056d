"""The stage `reading`: mini-schnell's front learns to recover from the noise the colors that it determines.

Feature distillation (FitNets, Romero et al. 2014, arXiv:1412.6550) before the stage `decide`: the student's
image tokens after the first blocks learn those of the same network when its prompt states the colors
(seed_conditioning.py), and linear probes learn to predict the colors from them. A batch costs half as much as
one of images, and minutes of it replace an hour of them.
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
from .scene import COLORS, Scene
from .seed_conditioning import (
    fully_specified_caption,
    spatial_order,
    underspecified_caption,
    with_seeded_colors,
)

UNSPECIFIED_SHARE = 0.85
"""Share of the captions that state no color of an object."""


@dataclass(frozen=True)
class FrontDistillationRecipe(Recipe):
    """Settings: a constant rate, a short average, and the image sizes."""

    lr: float = 2e-3
    warmup: int = 30
    decay_share: float = 0.0
    average: float = 0.9
    sizes: tuple[ImageSize, ...] = IMAGE_SIZES


def unspecified_color_labels(scenes: Sequence[Scene], noise: Tensor) -> Tensor:
    """Colors that noise [B, 16, h, w] determines: indices [B, 2] of COLORS, the left or upper object's first.

    -100, which cross_entropy ignores, where the scene specifies the color.
    """
    labels = torch.full((len(scenes), 2), -100)
    for row, scene, each in zip(labels, scenes, noise, strict=True):
        found = with_seeded_colors(scene, each)
        for label, place in enumerate(spatial_order(scene)):
            if scene.items[place].color is None:
                row[label] = list(COLORS).index(str(found.items[place].color))
    return labels


class FrontDistillationLoss(nn.Module):
    """Student, frozen teacher and four linear probes of the colors, with the loss of a batch.

    Two probes see the hidden states after the double blocks, two those after one single block: the mean of
    the text tokens, and every image token. To their cross-entropy is added the distance of the student's
    image tokens from those of the teacher, whose prompt states the colors.
    """

    def __init__(self, student: FluxTransformer, teacher: FluxTransformer) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)
        width = student.spec.hidden_size
        self.probes = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * len(COLORS))) for _ in range(4)
        )

    def forward(self, noise: Tensor, text: Conditioning, full: Conditioning, labels: Tensor) -> Tensor:
        """Loss of noise [B, 16, h, w] and labels [B, 2]; `full` is the text that states the colors."""
        with torch.no_grad():
            target = _front(self.teacher, noise, full)
        found = _front(self.student, noise, text)
        seen = [states for txt, img in found for states in (txt.mean(dim=1, keepdim=True), img)]
        probes = zip(self.probes, seen, strict=True)
        probing = torch.stack([_error(probe(states), labels) for probe, states in probes]).mean()
        (_, double), (_, single) = found
        (_, target_double), (_, target_single) = target
        return probing + _distance(double, target_double) + _distance(single, target_single)


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
    """Mean cross-entropy of logits [B, N, 2 * colors] against labels [B, 2], the same for all N."""
    each = logits.float().unflatten(-1, (2, len(COLORS)))
    return F.cross_entropy(each.flatten(0, 2), labels[:, None].expand(each.shape[:3]).flatten())


def _distance(states: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of states [B, N, hidden], each token normalized."""
    first, other = (F.layer_norm(x.float(), x.shape[-1:]) for x in (states, target))
    return F.mse_loss(first, other)


def train_front_distillation(
    run: TrainingRun,
    encoders: TextEncoders,
    student: FluxTransformer,
    recipe: FrontDistillationRecipe = FrontDistillationRecipe(),
) -> None:
    """Distill the front of `student` and write run.out; see train.loop for resuming and errors."""
    rng = run.seeded()
    teacher = FluxTransformer(student.spec)
    teacher.load_state_dict(student.state_dict())
    front = FrontDistillationLoss(student, teacher).to(device())
    optimizers = make_optimizers(front, recipe)
    loss_of = compiled(front, recipe)

    def update() -> Losses:
        width, height = draw_size(rng, recipe.sizes)
        noise = torch.randn(recipe.batch, 16, height // 8, width // 8)
        scenes, captions = zip(
            *(underspecified_caption(rng, UNSPECIFIED_SHARE) for _ in range(recipe.batch)), strict=True
        )
        text = encoders.encode(list(captions))
        full = encoders.encode(list(map(fully_specified_caption, scenes, noise)))
        labels = unspecified_color_labels(scenes, noise)
        with autocast(recipe):
            loss = loss_of(noise.to(device()), text, full, labels.to(device()))
        descend(loss, front, optimizers)
        return {"loss": loss.detach()}

    modules = {"student": student, "readers": front.probes}  # the names in checkpoints
    state = TrainingState(modules, optimizers, rng, WeightAverage(student, recipe.average))
    train(run, recipe, state, update)
