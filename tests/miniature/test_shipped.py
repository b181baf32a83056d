"""The miniatures that ship: small, and each generates what its prompts state, in its recommended sampling."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rectiflux
import torch
from rectiflux.benchmarks.prompts import SIX, Prompt, categories
from rectiflux.flux_core import load_autoencoder, load_text_encoders, load_transformer
from rectiflux.flux_core.weights import read_metadata
from rectiflux.miniature.checker import judge, score
from rectiflux.miniature.evaluate import FAMILY, generate_images
from rectiflux.miniature.scene import COLORS, SHAPES, Item, Scene
from rectiflux.miniature.scene_parser import parse_scene

ROOT = Path(rectiflux.__file__).parent
MODELS = ROOT / "models"
CARD = (MODELS / "README.md").read_text(encoding="utf-8")
SHIPPED = ("pro", "reflow", "dev", "schnell")
each = pytest.mark.parametrize("variant", SHIPPED)
LEAST = {"pro": 0.86, "reflow": 0.75, "dev": 0.86, "schnell": 0.83}
"""Smallest share of prompts of GenEval's categories that each must get right."""

QUICK = {variant: min(8, FAMILY[variant].steps) for variant in SHIPPED}
"""A variant's recommended steps, or the smaller number that the card scores too."""

Generate = Callable[..., list[np.ndarray]]


def transformer_file(variant: str) -> Path:
    return MODELS / "diffusion_models" / f"rectiflux-mini-{variant}.safetensors"


@pytest.fixture(scope="module")
def generate() -> Generate:
    """(variant, captions) -> images, each variant in its recommended sampling with the steps of QUICK."""
    text = MODELS / "text_encoders"
    files = text / "rectiflux-mini-clip.safetensors", text / "rectiflux-mini-t5.safetensors"
    encoders = load_text_encoders(*files, dtype=torch.float32)
    autoencoder = load_autoencoder(MODELS / "vae" / "rectiflux-mini-vae.safetensors", dtype=torch.float32)

    def generator(
        variant: str, captions: Sequence[str], steps: int | None = None, **options: object
    ) -> list[np.ndarray]:
        transformer = load_transformer(transformer_file(variant), dtype=torch.float32)
        way = replace(FAMILY[variant], steps=steps or QUICK[variant])
        return generate_images(transformer, encoders, autoencoder.decode, captions, way, **options)

    return generator


def share_right(images: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> float:
    passes = [
        judge(parse_scene(image), prompt.scene).passes for image, prompt in zip(images, prompts, strict=True)
    ]
    return sum(passes) / len(passes)


def card_scores() -> dict[tuple[str, int], dict[str, float]]:
    """Scores by column of each variant at its numbers of steps, from the card's table."""
    (head,) = re.findall(r"^\| \| overall \|(.*)\|$", CARD, re.MULTILINE)
    names = ["overall", *(name.strip() for name in head.split("|"))]
    rows = re.findall(r"^\| mini-([a-z]+), (\d+) step[^|]*\|(.*)\|$", CARD, re.MULTILINE)
    return {
        (name, int(steps)): dict(zip(names, map(float, values.replace("*", "").split("|")), strict=True))
        for name, steps, values in rows
    }


def own_scores(variant: str) -> dict[str, float]:
    """The card's scores of a variant in the steps of QUICK."""
    return card_scores()[variant, QUICK[variant]]


def test_they_are_small_enough_for_a_repository() -> None:
    sizes = [path.stat().st_size for path in MODELS.rglob("*.safetensors")]
    assert len(sizes) == len(SHIPPED) + 3 and sum(sizes) < 60e6 and max(sizes) < 16e6


@each
def test_the_card_states_the_recipe_in_the_file(variant: str) -> None:
    metadata = read_metadata(transformer_file(variant))
    assert f"{int(metadata['steps']):,} steps" in CARD and f"{int(metadata['samples']):,}" in CARD


@pytest.mark.slow
@each
def test_it_follows_prompts(variant: str, generate: Generate) -> None:
    """Every fifth prompt of the six categories, from another seed than the card's score was taken from."""
    prompts = [prompt for prompt in categories() if prompt.category in SIX][::5]
    right = share_right(generate(variant, [prompt.text for prompt in prompts], seed=70_000), prompts)
    assert len(prompts) >= 60
    assert right >= LEAST[variant]
    assert abs(right - own_scores(variant)["overall"]) < 0.12  # 60 images: three sigma


@pytest.mark.slow
def test_schnell_in_one_step(generate: Generate) -> None:
    """One pass through the network, every fifth prompt as above."""
    prompts = [prompt for prompt in categories() if prompt.category in SIX][::5]
    images = generate("schnell", [prompt.text for prompt in prompts], seed=72_000, steps=1)
    right = share_right(images, prompts)
    assert abs(right - card_scores()["schnell", 1]["overall"]) < 0.15  # 60 images: three sigma


@pytest.mark.slow
@each
def test_it_follows_prompts_that_training_never_showed(variant: str, generate: Generate) -> None:
    prompts = [prompt for prompt in categories() if prompt.category == "unseen"]
    assert len(prompts) == 56
    captions = [prompt.text for prompt in prompts]
    right = share_right(generate(variant, captions, seed=71_000), prompts)
    assert right >= own_scores(variant)["unseen"] - 0.17  # three sigma of 56 images


@pytest.mark.slow
@each
def test_short_prompts(variant: str, generate: Generate) -> None:
    """What people write first: every color with every shape, no more."""
    scenes = [Scene((Item(shape, color),)) for color in COLORS for shape in SHAPES]
    captions = [f"a {scene.items[0].color} {scene.items[0].shape}" for scene in scenes]
    assert score(generate(variant, captions, seed=2), scenes)["strict"] >= 0.9


def share_right_at_other_sizes(variant: str, generate: Generate, category: str) -> float:
    """Every second prompt of a category in wide images, the others in high ones."""
    prompts = [prompt for prompt in categories() if prompt.category == category]
    passes = 0.0
    for half, (width, height) in enumerate(((160, 112), (112, 160))):
        part = prompts[half::2]
        captions = [prompt.text for prompt in part]
        images = generate(variant, captions, seed=4, width=width, height=height)
        assert images[0].shape == (height, width, 3)
        passes += share_right(images, part) * len(part)
    return passes / len(prompts)


@pytest.mark.slow
@each
def test_other_sizes(variant: str, generate: Generate) -> None:
    """Wide and high images, as in training."""
    assert share_right_at_other_sizes(variant, generate, "colours") >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["pro", "dev", "schnell"])
def test_two_objects_at_other_sizes(variant: str, generate: Generate) -> None:
    """52, 49 and 46 of 56 when the card was written; a few may fall on the other side on another machine."""
    assert share_right_at_other_sizes(variant, generate, "position") >= 0.73


@pytest.mark.slow
@pytest.mark.xfail(reason="34 of 56 are right: weaker there than the others", strict=True)
def test_two_objects_at_other_sizes_by_reflow(generate: Generate) -> None:
    assert share_right_at_other_sizes("reflow", generate, "position") >= 0.73


@pytest.mark.slow
def test_they_are_no_memory_of_one_picture(generate: Generate) -> None:
    """One caption and two noises give two images; one noise gives one."""
    first, other = generate("dev", ["a blue star"] * 2, seed=5)
    again = generate("dev", ["a blue star"] * 2, seed=5)[0]
    assert np.array_equal(first, again)
    assert np.abs(first.astype(int) - other.astype(int)).mean() > 1


@pytest.mark.slow
def test_guidance_is_an_input_of_dev_alone(generate: Generate) -> None:
    """mini-dev is wired as FLUX.1 [dev]; the undistilled, the reflowed and schnell have no such input."""
    keys = {variant: read_metadata(transformer_file(variant)) for variant in SHIPPED}
    assert all("modelspec.title" in metadata for metadata in keys.values())
    embedded = {
        variant: load_transformer(transformer_file(variant)).spec.guidance_embed for variant in SHIPPED
    }
    assert embedded == {"pro": False, "reflow": False, "dev": True, "schnell": False}
