"""The miniature that ships: small, and it paints what is asked at the demo workflow's settings."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest
import rectiflux
import torch
from rectiflux.flux_core import load_autoencoder, load_text_encoders, load_transformer
from rectiflux.flux_core.train.checker import score
from rectiflux.flux_core.train.evaluate import draw_captions, evaluate
from rectiflux.flux_core.train.scenes import COLOURS, SHAPES, Scene
from rectiflux.flux_core.weights import read_metadata

ROOT = Path(rectiflux.__file__).parent
MODELS = ROOT / "models"
TRANSFORMER = MODELS / "diffusion_models" / "rectiflux-mini.safetensors"
CARD = (MODELS / "README.md").read_text(encoding="utf-8")

Miniature = tuple[object, object, object]


@pytest.fixture(scope="module")
def miniature() -> Miniature:
    text = MODELS / "text_encoders"
    files = text / "rectiflux-mini-clip.safetensors", text / "rectiflux-mini-t5.safetensors"
    encoders = load_text_encoders(*files, dtype=torch.float32)
    autoencoder = load_autoencoder(MODELS / "vae" / "rectiflux-mini-vae.safetensors", dtype=torch.float32)
    return load_transformer(TRANSFORMER, dtype=torch.float32), encoders, autoencoder.decode


def test_it_is_small_enough_for_a_repository() -> None:
    sizes = [path.stat().st_size for path in MODELS.rglob("*.safetensors")]
    assert len(sizes) == 4 and sum(sizes) < 40e6 and max(sizes) < 16 * 2**20


def test_the_card_tells_the_recipe_that_the_file_carries() -> None:
    metadata = read_metadata(TRANSFORMER)
    assert f"{int(metadata['samples']):,} pictures" in CARD and f"{int(metadata['steps']):,} steps" in CARD


def test_scores_are_those_of_the_demo_workflows_settings() -> None:
    """What `evaluate` does unless told otherwise is what the demo workflow does."""
    nodes = json.loads((ROOT / "workflows" / "text_to_image.json").read_text(encoding="utf-8"))["nodes"]
    widgets = {node["type"]: node.get("widgets_values") for node in nodes}
    defaults = {
        name: parameter.default
        for function in (draw_captions, evaluate)
        for name, parameter in inspect.signature(function).parameters.items()
    }
    steps, denoise, shift, _ = widgets["RectifluxSchedule"]
    assert (steps, denoise, shift) == (defaults["steps"], 1.0, "by size")
    assert widgets["RectifluxSampler"] == [defaults["cfg_scale"]]
    assert widgets["RectifluxEmptyLatent"][:2] == [defaults["side"]] * 2
    assert widgets["RectifluxSolver"] == ["euler"] and widgets["RectifluxNegativePrompt"] == [""]


@pytest.mark.slow
def test_it_paints_what_is_asked(miniature: Miniature) -> None:
    """Captions that tell everything, other ones than the card's score was taken from: 8 in 10 and more."""
    scores, _ = evaluate(*miniature, 40, seed=7)
    assert scores["strict"] >= 0.8, scores
    card = re.search(r"strict[^|]*\| *\*{0,2}([0-9.]+) %", CARD)
    assert card is not None and abs(float(card[1]) / 100 - scores["strict"]) < 0.1  # 40 captions: 3 sigma


PHRASES = [
    ("a small red circle in the center", Scene("circle", "red", "small", "center")),
    ("LARGE RED HEART, TOP", Scene("heart", "red", "large", "top")),
    ("a large yellow star on a navy background, left", Scene("star", "yellow", "large", "left", "navy")),
    ("small green square, top right", Scene("square", "green", "small", "top right")),
    ("a sky background with a pink heart, at the bottom", Scene("heart", "pink", None, "bottom", "sky")),
    ("a large orange triangle in the middle", Scene("triangle", "orange", "large", "center")),
    ("a purple cross, left, mint background", Scene("cross", "purple", None, "left", "mint")),
    ("small blue square at the right, gray background", Scene("square", "blue", "small", "right", "gray")),
]


@pytest.mark.slow
def test_other_orders_upper_case_and_some_things_left_open(miniature: Miniature) -> None:
    """All of these say where the object is; prompts that do not are the next test's."""
    torch.manual_seed(0)
    pictures = draw_captions(*miniature, [phrase for phrase, _ in PHRASES], seed=3)
    assert score(pictures, [scene for _, scene in PHRASES])["strict"] >= 0.75


@pytest.mark.slow
@pytest.mark.xfail(
    reason="22 of 42 are right: the training has not yet learned to choose a place", strict=True
)
def test_short_prompts(miniature: Miniature) -> None:
    """What people write first: every colour with every shape, no more. The goal is that of full ones."""
    scenes = [Scene(shape, colour) for colour in COLOURS for shape in SHAPES]
    captions = [f"a {scene.colour} {scene.shape}" for scene in scenes]
    assert score(draw_captions(*miniature, captions, seed=2), scenes)["strict"] >= 0.8


@pytest.mark.slow
def test_it_is_no_memory_of_one_picture(miniature: Miniature) -> None:
    """One caption and two seeds give two pictures; one seed gives one."""
    first, other = draw_captions(*miniature, ["a large blue star in the middle"] * 2, seed=5)
    again = draw_captions(*miniature, ["a large blue star in the middle"] * 2, seed=5)[0]
    assert np.array_equal(first, again)
    assert np.abs(first.astype(int) - other.astype(int)).mean() > 1
