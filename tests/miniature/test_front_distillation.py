"""Front distillation: its labels, its loss against what it must equal, and that it learns."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from rectiflux.flux_core import load_transformer
from rectiflux.flux_core.model.spec import Conditioning
from rectiflux.flux_core.train import loop
from rectiflux.miniature import front_distillation as front
from rectiflux.miniature.scene import COLORS, Item, Scene
from rectiflux.miniature.text_encoders import make_encoders

from .tiny import SIZES, TINY, inputs, network, noise_with_means


def test_labels_are_what_is_open_alone() -> None:
    """Of red, orange, ...: the left or upper object's color, the other's; -100 where nothing is open."""
    noise = torch.stack([noise_with_means(1.0, -0.2)] * 6)
    star, heart, blue = Item("star"), Item("heart"), Item("square", "blue")
    scenes = [Scene((star, heart)), Scene((blue, heart)), Scene((star,)), Scene((star,) * 3), Scene((blue,))]
    scenes.append(Scene((heart, star), "right"))
    red, green = list(COLORS).index("red"), list(COLORS).index("green")
    found = front.unspecified_color_labels(scenes, noise).tolist()
    assert found == [[red, green], [-100, green], [red, -100], [red, -100], [-100, -100], [red, green]]


def test_the_loss_of_a_student_that_is_its_teacher_is_that_of_the_probes() -> None:
    """With the same text both have the same tokens; probes of zero then lose ln 7. With another, more."""
    noise, text = inputs(2)
    other = Conditioning(text.txt + 1, text.pooled - 1)
    loss = front.FrontDistillationLoss(network(), network())
    for probe in loss.probes:
        torch.nn.init.zeros_(probe[1].weight)
        torch.nn.init.zeros_(probe[1].bias)
    labels = torch.tensor([[3, -100], [0, 6]])
    same, apart = loss(noise, text, text, labels), loss(noise, text, other, labels)
    assert same.item() == pytest.approx(math.log(7), abs=1e-5) and apart.item() > same.item() + 1e-3
    apart.backward()
    assert all(parameter.grad is None for parameter in loss.teacher.parameters())
    fronts = [loss.student.double_blocks, loss.student.single_blocks]
    assert all(parameter.grad is not None for part in fronts for parameter in part.parameters())


def test_it_learns() -> None:
    """One batch learned by heart: the loss of eight noises and their colors falls by a quarter."""
    torch.manual_seed(1)
    noise, text = inputs(8)
    labels = torch.randint(7, (8, 2))
    loss = front.FrontDistillationLoss(network(), network())
    optimizers = loop.make_optimizers(loss, front.FrontDistillationRecipe())
    first = loss(noise, text, text, labels).item()
    for _ in range(40):
        loop.descend(loss(noise, text, text, labels), loss, optimizers)
    assert loss(noise, text, text, labels).item() < 0.75 * first


def test_it_writes_a_model(tmp_path: Path) -> None:
    out, recipe = (
        tmp_path / "a.safetensors",
        front.FrontDistillationRecipe(batch=4, compiled=False, sizes=SIZES),
    )
    front.train_front_distillation(loop.TrainingRun(out, 1), make_encoders(), network(), recipe)
    assert load_transformer(out).spec == TINY
