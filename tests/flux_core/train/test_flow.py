"""The base's training: noise levels, velocity and tutor, and that it learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rectiflux.flux_core import FluxSpec, FluxTransformer, load_transformer, pack, unpack
from rectiflux.flux_core.model.autoencoder import AutoEncoder
from rectiflux.flux_core.model.spec import Conditioning
from rectiflux.flux_core.train import flow
from rectiflux.miniature import data
from rectiflux.miniature.scene import COLOURS, SHAPES
from rectiflux.miniature.text_encoders import WIDTH, make_encoders

TINY = FluxSpec(hidden_size=64, num_heads=1, depth=1, depth_single=2, context_in=WIDTH, vec_in=WIDTH)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory, new_autoencoder: Callable[[], AutoEncoder]) -> Path:
    path = tmp_path_factory.mktemp("latents") / "latents.safetensors"
    data.write_latents(path, new_autoencoder(), 40, seed=3, workers=1, sizes=((64, 32, 1.0),))
    return path


def some_text(batch: int) -> Conditioning:
    return Conditioning(torch.randn(batch, 5, WIDTH), torch.randn(batch, WIDTH))


def test_sigmas_are_logit_normal_with_a_uniform_share() -> None:
    """Quartiles of the logits, mean +- 0.6745 std, without the uniform share; the ends only with it."""
    torch.manual_seed(0)
    sigmas = flow.draw_sigmas(100_000, 0.7, 1.2, uniform_share=0.0)
    quartiles = torch.logit(sigmas).quantile(torch.tensor([0.25, 0.5, 0.75]))
    assert quartiles.tolist() == pytest.approx([0.7 - 0.6745 * 1.2, 0.7, 0.7 + 0.6745 * 1.2], abs=0.02)
    uniform = flow.draw_sigmas(100_000, uniform_share=1.0)
    assert uniform.histc(10, 0, 1).tolist() == pytest.approx([10_000] * 10, rel=0.05)


def test_prediction_is_that_of_sampling() -> None:
    """Against sampling's own way: prepare and forward, each picture alone at its sigma."""
    torch.manual_seed(1)
    model, noisy, text = FluxTransformer(TINY), torch.randn(2, 16, 4, 6), some_text(2)
    with torch.no_grad():
        found = flow.predict(model, noisy, torch.tensor([0.25, 0.75]), text)
        for i, sigma in enumerate((0.25, 0.75)):
            one = Conditioning(text.txt[i : i + 1], text.pooled[i : i + 1])
            tokens = model(pack(noisy[i : i + 1]), model.prepare(one, [sigma], 4, 6), sigma)
            assert torch.allclose(found[i : i + 1], unpack(tokens, 4, 6), atol=1e-5)


def test_the_loss_of_a_fresh_model_is_that_of_no_velocity() -> None:
    """adaLN-zero: the first velocity is zero, so the loss is the mean of (noise - image)^2."""
    torch.manual_seed(0)
    model = FluxTransformer(TINY)
    flow.initialise(model)
    images, noise = torch.randn(3, 16, 4, 6), torch.randn(3, 16, 4, 6)
    labels = torch.zeros(3, 6, 18, dtype=torch.uint8)
    loss, _ = flow.Lesson(model, 1)(images, noise, torch.tensor([0.1, 0.5, 0.9]), some_text(3), labels)
    assert loss.item() == pytest.approx((noise - images).square().mean().item(), rel=1e-5)


def test_the_loss_is_the_velocitys_error_at_the_right_point() -> None:
    """At (1 - s) image + s noise, against noise - image, and the tutor's reading changes nothing in it."""
    torch.manual_seed(1)
    model, text = FluxTransformer(TINY), some_text(2)
    images, noise, sigmas = torch.randn(2, 16, 4, 6), torch.randn(2, 16, 4, 6), torch.tensor([0.25, 0.75])
    s = sigmas[:, None, None, None]
    labels = torch.zeros(2, 6, 18, dtype=torch.uint8)
    with torch.no_grad():
        velocity = flow.predict(model, (1 - s) * images + s * noise, sigmas, text)
        loss, _ = flow.Lesson(model, 1)(images, noise, sigmas, text, labels)
    assert loss.item() == pytest.approx((velocity - (noise - images)).square().mean().item(), rel=1e-5)


def test_a_tutor_that_knows_has_no_loss_and_one_that_guesses_has_the_entropy() -> None:
    """Logits of 30 for what the labels say; zero weights give ln 8 + ln 8 + ln 2 (7 of each, or none)."""
    tutor = flow.Tutor(4)
    torch.nn.init.zeros_(tutor.read.weight)
    torch.nn.init.zeros_(tutor.read.bias)
    labels = torch.zeros(1, 2, 18, dtype=torch.uint8)
    labels[..., 0], labels[..., 1], labels[..., 2:] = 3, 5, 255
    guess = math.log(1 + len(SHAPES)) + math.log(1 + len(COLOURS)) + math.log(2)
    assert tutor(torch.zeros(1, 2, 4), labels).item() == pytest.approx(guess, rel=1e-6)
    tutor.read.bias.data[[3, 8 + 5]] = 30.0
    tutor.read.bias.data[16:] = 30.0
    assert tutor(torch.zeros(1, 2, 4), labels).item() < 1e-6


def train(out: Path, latents: Path, steps: int, **settings: object) -> None:
    recipe = flow.FlowRecipe(batch=4, warmup=2, compiled=False, **settings)
    flow.train_flow(out, latents, make_encoders(), steps, recipe=recipe, spec=TINY)


def test_the_same_seed_gives_the_same_weights(latents: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(tmp_path / f"{name}.safetensors", latents, 3)
    a, b = (load_transformer(tmp_path / f"{name}.safetensors", dtype=torch.float32) for name in ("a", "b"))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_bf16_writes_float32_weights(latents: Path, tmp_path: Path) -> None:
    train(tmp_path / "a.safetensors", latents, 2, bf16=True)
    model = load_transformer(tmp_path / "a.safetensors")
    assert model.spec == TINY and model.dtype == torch.float32


@pytest.mark.slow
def test_it_learns(latents: Path, tmp_path: Path) -> None:
    """The loss of the same noise falls by more than a quarter of a fresh model's within 120 small steps."""
    import random

    train(tmp_path / "a.safetensors", latents, 120)
    model = load_transformer(tmp_path / "a.safetensors", dtype=torch.float32)
    images, captions, _ = data.LatentSet(latents).batch(40, random.Random(9), 0.0)
    torch.manual_seed(9)
    noise, sigmas = torch.randn_like(images), torch.full((40,), 0.5)
    with torch.no_grad():
        text = make_encoders().encode(captions)
        velocity = flow.predict(model, 0.5 * images + 0.5 * noise, sigmas, text)
    assert (velocity - (noise - images)).square().mean() < 0.75 * (noise - images).square().mean()
