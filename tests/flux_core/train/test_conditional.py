"""Training with images: the wider input, the target of the loss, and that it learns."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rectiflux.flux_core import load_transformer
from rectiflux.flux_core.train import conditional
from rectiflux.flux_core.train.conditional import ConditionalRecipe, ImageBatch
from rectiflux.flux_core.train.flow import predict_velocity
from rectiflux.flux_core.train.loop import TrainingRun

from .tiny import TINY, Encoders, inputs, network

GUIDED = replace(TINY, guidance_embed=True)


def test_new_input_channels_have_no_effect_at_first() -> None:
    model, (noisy, sigmas, text) = network(1, GUIDED), inputs(2)
    wider = conditional.with_input_channels(model, 128)
    assert wider.spec == replace(GUIDED, in_channels=128)
    control = replace(text, extra=torch.randn_like(noisy))
    guidance = torch.ones(2)
    with torch.no_grad():
        found = predict_velocity(wider, noisy, sigmas, control, guidance)
        torch.testing.assert_close(found, predict_velocity(model, noisy, sigmas, text, guidance))
    with pytest.raises(ValueError, match="128 input channels cannot get 64"):
        conditional.with_input_channels(wider, 64)


def test_the_loss_is_the_error_to_the_guided_target() -> None:
    """noise - image + (1 - 1/g)(v(prompt, g) - v(no prompt, 1)), weighted where the image changes."""
    model, (images, sigmas, text) = network(1, GUIDED), inputs(2)
    empty, noise, guidance = inputs(2, seed=9)[2], torch.randn_like(images), torch.tensor([1.0, 4.0])
    changed = (torch.rand_like(images[:, :1]) < 0.5).float()
    s = sigmas[:, None, None, None]
    with torch.no_grad():
        loss = conditional.ModelGuidanceLoss(model, 3.0)(
            images, noise, sigmas, (text, empty), guidance, changed
        )
        x = (1 - s) * images + s * noise
        velocity = predict_velocity(model, x, sigmas, text, guidance)
        plain = predict_velocity(model, x, sigmas, empty, torch.ones(2))
    w = torch.tensor([0.0, 0.75])[:, None, None, None]
    error = (velocity - (noise - images) - w * (velocity - plain)).square() * (1 + 3 * changed)
    assert loss.item() == pytest.approx(error.mean().item() / (1 + 3 * changed).mean().item(), rel=1e-5)


class Copies:
    """The image is in the extra channels, or in a reference."""

    def __init__(self, in_channels: int) -> None:
        self.in_channels = in_channels

    def batch(self, size: int, rng: random.Random, empty_share: float) -> ImageBatch:
        latents = torch.randn(size, 16, 1, 1).expand(-1, -1, 4, 8).contiguous()
        captions = ["" if rng.random() < empty_share else "a b" for _ in range(size)]
        images = (latents, ()) if self.in_channels == 128 else (None, (latents,))
        return ImageBatch(latents, captions, torch.zeros(size, 1, 4, 8), *images)


@pytest.mark.parametrize("in_channels", [64, 128])
def test_it_learns_to_use_the_images(tmp_path: Path, in_channels: int) -> None:
    model, data = conditional.with_input_channels(network(1, GUIDED), in_channels), Copies(in_channels)
    recipe = ConditionalRecipe(batch=16, lr=5e-3, warmup=5, compiled=False, average=0.9)
    run = TrainingRun(tmp_path / "copies.safetensors", 60)
    with pytest.raises(ValueError, match="guidance embedder"):
        conditional.train_conditional(run, data, Encoders(), network(1), recipe)
    batch = data.batch(64, random.Random(0), 0.0)

    def error(network) -> float:
        with torch.no_grad():
            text = conditional.with_images(Encoders().encode(batch.captions), batch)
            torch.manual_seed(1)
            noise, sigmas = torch.randn_like(batch.latents), torch.full((64,), 0.8)
            x = 0.2 * batch.latents + 0.8 * noise
            found = predict_velocity(network, x, sigmas, text, torch.ones(64))
            return (found - noise + batch.latents).square().mean().item()

    before = error(model)
    conditional.train_conditional(run, data, Encoders(), model, recipe)
    trained = load_transformer(run.out, dtype=torch.float32)
    assert error(trained) < before / 2
