"""The stages' pairs: sampled as they say, from the prompt that the teacher is given."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from rectiflux.flux_core.pipeline import draw_noise
from rectiflux.flux_core.train.pairs import PairSet
from rectiflux.miniature.evaluate import Sampling, generate_latents
from rectiflux.miniature.pairs import PairRecipe, write_pairs
from rectiflux.miniature.scene import Item, Scene
from rectiflux.miniature.seed_conditioning import fully_specified_caption
from rectiflux.miniature.text_encoders import make_encoders

from .tiny import SIZES, network


def test_pairs_lie_at_both_ends_of_the_teachers_path(tmp_path: Path) -> None:
    """Float16 of what sampling gives for their noise and captions."""
    sampling, encoders = Sampling(2, cfg_scale=2.0), make_encoders()
    write_pairs(tmp_path, network(), encoders, 4, PairRecipe(sampling, sizes=SIZES, seed=1, batch=4))
    noise, latents, captions = PairSet(tmp_path).batch(9, random.Random(0))
    seeded = draw_noise(1 * 1_000_003, 4, 4, 8).half().float()
    assert all(any(torch.equal(each, one) for one in seeded) for each in noise)
    text, empty = encoders.encode(captions), encoders.encode([""] * 9)
    assert torch.allclose(latents, generate_latents(network(), text, empty, sampling, noise), atol=5e-3)


def test_the_teacher_gets_its_own_prompt(tmp_path: Path) -> None:
    """The caption that is kept leaves open what the teacher's states."""
    sampling, encoders, scene = Sampling(2), make_encoders(), Scene((Item("star"),))
    recipe = PairRecipe(sampling, lambda _: (scene, "a star"), fully_specified_caption, SIZES, batch=4)
    write_pairs(tmp_path, network(), encoders, 4, recipe)
    noise, latents, captions = PairSet(tmp_path).batch(9, random.Random(0))
    assert captions == ["a star"] * 9
    full, empty = (
        encoders.encode([fully_specified_caption(scene, each) for each in noise]),
        encoders.encode([""] * 9),
    )
    assert torch.allclose(latents, generate_latents(network(), full, empty, sampling, noise), atol=1e-2)
    bare = generate_latents(network(), encoders.encode(captions), empty, sampling, noise)
    assert not torch.allclose(latents, bare, atol=1e-2)
