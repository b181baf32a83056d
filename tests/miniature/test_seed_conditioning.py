"""Seed conditioning: which colors a noise determines, what captions leave open, and what is learned of it."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rectiflux.flux_core import load_transformer
from rectiflux.flux_core.train.distribution_matching import rollout
from rectiflux.flux_core.train.flow import predict_velocity
from rectiflux.flux_core.train.loop import TrainingRun
from rectiflux.flux_core.train.pairs import PairSet
from rectiflux.miniature import evaluate
from rectiflux.miniature import seed_conditioning as decide
from rectiflux.miniature.pairs import PairRecipe, write_pairs
from rectiflux.miniature.scene import COLORS, HELD_OUT_PAIRS, Item, Scene
from rectiflux.miniature.text_encoders import make_encoders

from .tiny import SIZES, inputs, network, noise_with_means


def test_noise_determines_the_colors_that_a_scene_leaves_open() -> None:
    """By the angle of the means of channels 0 and 1, three colors further for the right or lower object."""
    scene = Scene((Item("star"), Item("heart")), "above")
    found = decide.with_seeded_colors(scene, noise_with_means(1.0, -0.2))
    assert found == Scene((Item("star", "red"), Item("heart", "green")), "above")
    colors = [item.color for item in decide.with_seeded_colors(scene, noise_with_means(-1.0, -0.3)).items]
    assert colors == ["blue", "red"]
    below = decide.with_seeded_colors(
        Scene((Item("heart"), Item("star")), "below"), noise_with_means(-1.0, -0.3)
    )
    assert [item.color for item in below.items] == ["red", "blue"]
    alike = decide.with_seeded_colors(Scene((Item("star"),) * 3), noise_with_means(1.0, -0.2))
    assert [item.color for item in alike.items] == ["red"] * 3
    stated = replace(scene, items=(Item("star", "blue"), Item("heart")), background="mint")
    found = decide.with_seeded_colors(stated, noise_with_means(1.0, -0.2))
    assert found == replace(stated, items=(Item("star", "blue"), Item("heart", "green")))
    assert decide.with_seeded_colors(Scene(), noise_with_means(1.0, 0.0)) == Scene()
    assert (
        decide.fully_specified_caption(scene, noise_with_means(1.0, -0.2)) == "a red star above a green heart"
    )


def test_noise_determines_no_color_that_the_prompt_excludes() -> None:
    """Towards one that is: the nearest other. Combinations held out from training are not excluded."""
    for shape, color in HELD_OUT_PAIRS:
        place = decide.COLOR_WHEEL.index(color)
        angle = 2 * math.pi * place / len(decide.COLOR_WHEEL) + 0.1
        noise = noise_with_means(math.cos(angle), math.sin(angle))
        after = decide.COLOR_WHEEL[(place + 1) % len(decide.COLOR_WHEEL)]
        assert decide.with_seeded_colors(Scene((Item(shape),)), noise).items[0].color == color
        assert decide.with_seeded_colors(Scene((Item(shape),), without=color), noise).items[0].color == after


def test_every_color_is_as_likely_as_any_other() -> None:
    assert sorted(decide.COLOR_WHEEL) == sorted(COLORS)
    noise = torch.randn(3_000, 3, 2, 2, generator=torch.Generator().manual_seed(3))
    scene = Scene((Item("star"), Item("circle")))
    found = [decide.with_seeded_colors(scene, each).items for each in noise]
    for place in (0, 1):
        names = [items[place].color for items in found]
        assert [names.count(name) / len(names) for name in COLORS] == pytest.approx([1 / 7] * 7, abs=0.03)


def test_captions_of_the_stage_leave_more_open() -> None:
    """Three in four state no color, but of two shapes alike, whose colors alone distinguish them."""
    rng = random.Random(0)
    scenes = [decide.underspecified_caption(rng)[0] for _ in range(2_000)]
    twins = [s for s in scenes if s.kind == "pair" and s.items[0].shape == s.items[1].shape]
    others = [s for s in scenes if s not in twins]
    assert twins and all(item.color for scene in twins for item in scene.items)
    bare = sum(all(item.color is None for item in scene.items) for scene in others) / len(others)
    assert bare == pytest.approx(0.75 + 0.25 * 0.15, abs=0.04)  # a seventh had no color before


def test_the_loss_is_the_distance_to_the_image_that_the_noise_stands_for() -> None:
    """None where the network predicts that image at once; else square or nearly absolute."""
    noise, text = inputs(2)
    student = network()
    x, sigma = rollout(student, noise, text, 1)
    with torch.no_grad():
        at_once = x - 0.75 * predict_velocity(student, x, sigma, text)
    loss = decide.SeedConditioningLoss(student, 0.03)
    assert loss(x, sigma, at_once, text).item() == pytest.approx(0.0, abs=1e-6)
    assert loss(x, sigma, at_once + 0.04, text).item() == pytest.approx(0.02, abs=1e-6)  # of 3, 4 and 5


@pytest.mark.slow
def test_it_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In 60 small steps its loss falls by a tenth."""
    encoders, teacher, out = make_encoders(), network(), tmp_path / "a.safetensors"
    own = PairRecipe(
        evaluate.FAMILY["schnell"],
        decide.underspecified_caption,
        decide.fully_specified_caption,
        SIZES,
        seed=1,
        batch=4,
    )
    write_pairs(tmp_path / "own", teacher, encoders, 8, own)
    pairs, recipe = (
        PairSet(tmp_path / "own"),
        decide.SeedConditioningRecipe(batch=8, warmup=2, compiled=False),
    )
    capsys.readouterr()
    for steps in (1, 60):
        decide.train_seed_conditioning(TrainingRun(out, steps), pairs, encoders, network(), recipe)
    lines = [line for line in capsys.readouterr().err.splitlines() if "loss " in line]
    first, last = (float(line.split("loss ")[1].split(",")[0]) for line in (lines[0], lines[-1]))
    assert last < 0.9 * first
    assert load_transformer(out).spec == teacher.spec
