"""Training data and training of mini-kontext, on a transformer of two blocks."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rectiflux.flux_core import FluxTransformer
from rectiflux.flux_core.model.autoencoder import AutoEncoder, to_model_space
from rectiflux.flux_core.tools.kontext import with_references
from rectiflux.flux_core.train.conditional import ModelGuidanceLoss, train_conditional
from rectiflux.flux_core.train.flow import predict_velocity
from rectiflux.flux_core.train.loop import TrainingRun
from rectiflux.flux_core.weights import read_metadata, read_state_dict
from rectiflux.miniature.autoencoder import from_uint8
from rectiflux.miniature.edits import Edit, PlacedScene, random_edit
from rectiflux.miniature.evaluate import Sampling
from rectiflux.miniature.kontext import (
    EditScenes,
    KontextRecipe,
    edit_images,
)
from rectiflux.miniature.scene import PlacedItem
from rectiflux.miniature.text_encoders import make_encoders

from .tiny import TINY

RECIPE = KontextRecipe(batch=2, compiled=False, save_every=2)


def editor() -> FluxTransformer:
    torch.manual_seed(0)
    return FluxTransformer(replace(TINY, guidance_embed=True))


def test_a_batch_holds_the_latents_of_both_images(new_autoencoder: Callable[[], AutoEncoder]) -> None:
    """As the autoencoder itself encodes them; the first edit is that of the same random state."""
    vae = new_autoencoder()
    batch = EditScenes(vae, two_references=0.0).batch(3, random.Random(4), 0.0)
    rng = random.Random(4)
    rng.random()
    edit = random_edit(rng)
    assert batch.captions[0] == edit.instruction and len(batch.references) == 1
    for latents, placed in ((batch.latents, edit.after), (batch.references[0], edit.references[0])):
        with torch.no_grad():
            expected = to_model_space(vae.encode(from_uint8(placed.render()[None])))
        assert torch.allclose(latents[:1], expected, atol=1e-3)


def test_changed_places_are_those_of_the_edited_object(new_autoencoder: Callable[[], AutoEncoder]) -> None:
    data = EditScenes(new_autoencoder(), two_references=1.0)
    rng = random.Random(0)
    batches = [data.batch(4, rng, 0.0) for _ in range(2)]
    for batch in batches:
        assert len(batch.references) == 2 and batch.changed.shape == (4, 1, 16, 16)
        apart = (batch.latents - batch.references[0]).abs().amax(dim=1, keepdim=True)
        assert apart[batch.changed == 0].max() < 0.2 < apart[batch.changed == 1].max()
        assert 0 < batch.changed.mean() < 0.3


def test_without_guidance_the_target_is_the_plain_velocity() -> None:
    """The weighted loss by hand; with guidance the same weights have another loss."""
    torch.manual_seed(1)
    model, encoders = editor(), make_encoders()
    latents, noise, reference = (torch.randn(2, 16, 8, 8) for _ in range(3))
    changed = torch.zeros(2, 1, 8, 8)
    changed[:, :, :2] = 1
    text, empty = (
        with_references(encoders.encode(prompts), [reference], 8, 8)
        for prompts in (["make it red", "remove it"], [""] * 2)
    )
    sigmas, guidance = torch.tensor([0.3, 0.8]), torch.tensor([2.0, 4.0])
    inputs = (latents, noise, sigmas, (text, empty), guidance, changed)
    with torch.no_grad():
        loss = ModelGuidanceLoss(model, 3.0, guided=False)(*inputs)
        guided = ModelGuidanceLoss(model, 3.0)(*inputs)
        s = sigmas[:, None, None, None]
        velocity = predict_velocity(model, (1 - s) * latents + s * noise, sigmas, text, guidance)
    error = (velocity - (noise - latents)).square()
    expected = (4 * error[:, :, :2].sum() + error[:, :, 2:].sum()) / (16 * 2 * (4 * 16 + 48))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert guided.item() != pytest.approx(loss.item(), rel=1e-4)


def test_an_interrupted_training_resumes_to_the_same_weights(
    tmp_path: Path, new_autoencoder: Callable[[], AutoEncoder]
) -> None:
    data, encoders = EditScenes(new_autoencoder()), make_encoders()
    recipe = replace(RECIPE, decay_share=0.0)
    train_conditional(TrainingRun(tmp_path / "whole", 4), data, encoders, editor(), recipe)
    for steps in (2, 4):
        train_conditional(TrainingRun(tmp_path / "parts", steps), data, encoders, editor(), recipe)
    whole, parts = (read_state_dict(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert any(not torch.equal(whole[name], value) for name, value in editor().state_dict().items())
    assert read_metadata(tmp_path / "whole")["samples"] == "8"


def test_an_edited_image_depends_on_its_reference(new_autoencoder: Callable[[], AutoEncoder]) -> None:
    def edit(color: str) -> Edit:
        placed = PlacedScene((PlacedItem("star", color, 64, 64, 21),), "gray")
        return Edit("recolor", (placed,), "make it green", placed)

    vae, encoders, model = new_autoencoder(), make_encoders(), editor()
    red, again, blue = (
        edit_images(model, encoders, vae, [edit(color)], Sampling(1, guidance=3.5), seed=3)[0]
        for color in ("red", "red", "blue")
    )
    assert (red == again).all() and (red != blue).any()
