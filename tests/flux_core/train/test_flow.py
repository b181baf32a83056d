"""Flow training: noise levels, the velocity's loss, the head on hidden states, and that it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rectiflux.flux_core import (
    FluxTransformer,
    TokenGroup,
    VelocityRequest,
    guided_velocity,
    load_transformer,
    pack,
    unpack,
)
from rectiflux.flux_core.model.spec import Conditioning
from rectiflux.flux_core.train import flow
from rectiflux.flux_core.train.loop import TrainingRun
from torch import Tensor, nn

from .tiny import TINY, Encoders, Latents, inputs, network

DEEP = replace(TINY, depth_single=2)


class Head(nn.Module):
    """Predicts two values of each token."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(64, 2)

    def forward(self, states: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(self.read(states), labels)


def build(depth: int = 1) -> flow.FlowWithRepaLoss:
    model = FluxTransformer(DEEP)
    flow.initialize(model)
    return flow.FlowWithRepaLoss(model, Head(), depth)


def test_sigmas_are_logit_normal_with_a_uniform_share() -> None:
    """Quartiles of the logits, mean +- 0.6745 std, without the uniform share; the ends only with it."""
    torch.manual_seed(0)
    sigmas = flow.draw_sigmas(100_000, 0.7, 1.2, uniform_share=0.0)
    quartiles = torch.logit(sigmas).quantile(torch.tensor([0.25, 0.5, 0.75]))
    assert quartiles.tolist() == pytest.approx([0.7 - 0.6745 * 1.2, 0.7, 0.7 + 0.6745 * 1.2], abs=0.02)
    uniform = flow.draw_sigmas(100_000, uniform_share=1.0)
    assert uniform.histc(10, 0, 1).tolist() == pytest.approx([10_000] * 10, rel=0.05)


def test_prediction_is_that_of_sampling() -> None:
    """Against `prepare` and `forward`, each latent alone at its sigma."""
    model, (noisy, _, text) = network(1, DEEP), inputs(2)
    with torch.no_grad():
        found = flow.predict_velocity(model, noisy, torch.tensor([0.25, 0.75]), text)
        for i, sigma in enumerate((0.25, 0.75)):
            one = Conditioning(text.txt[i : i + 1], text.pooled[i : i + 1])
            tokens = model(pack(noisy[i : i + 1]), model.prepare(one, [sigma], 4, 8), sigma)
            assert torch.allclose(found[i : i + 1], unpack(tokens, 4, 8), atol=1e-5)


@pytest.mark.parametrize("sigma", [None, 0.0])
def test_prediction_with_images_is_that_of_sampling(sigma: float | None) -> None:
    """A control image's channels and a reference's tokens, modulated as the image's or at a sigma."""
    model, (noisy, _, text) = network(1, replace(DEEP, in_channels=128)), inputs(2)
    torch.manual_seed(5)
    control, tokens = torch.randn(2, 16, 4, 8), torch.randn(2, 6, 128)
    ids = torch.tensor([[1.0, row, column] for row in range(2) for column in range(3)])
    text = replace(text, extra=control, groups=(TokenGroup(tokens, ids, sigma),))
    request = VelocityRequest(text, [0.25], 4, 8, batch=2)
    with torch.no_grad():
        found = flow.predict_velocity(model, noisy, torch.tensor([0.25, 0.25]), text)
        assert torch.allclose(found, guided_velocity(model, request)(noisy, 0.25), atol=1e-5)


def test_the_loss_of_a_fresh_model_is_that_of_no_velocity() -> None:
    """adaLN-zero: the first velocity is zero, so the loss is the mean of (noise - image)^2."""
    images, sigmas, text = inputs(3)
    noise = torch.randn_like(images)
    loss, _ = build()(images, noise, sigmas, text, torch.zeros(3, 8, 2))
    assert loss.item() == pytest.approx((noise - images).square().mean().item(), rel=1e-5)


def test_the_loss_is_the_velocitys_error_at_the_right_point() -> None:
    """At (1 - s) image + s noise, against noise - image; the head changes nothing in it."""
    model, (images, sigmas, text) = network(1, DEEP), inputs(2)
    noise, s = torch.randn_like(images), sigmas[:, None, None, None]
    with torch.no_grad():
        velocity = flow.predict_velocity(model, (1 - s) * images + s * noise, sigmas, text)
        loss, _ = flow.FlowWithRepaLoss(model, Head(), 1)(images, noise, sigmas, text, torch.zeros(2, 8, 2))
    assert loss.item() == pytest.approx((velocity - (noise - images)).square().mean().item(), rel=1e-5)


def test_the_head_sees_the_blocks_before_it_alone() -> None:
    """Its loss trains the double and the first single block, and leaves the second."""
    objective, (images, sigmas, text) = flow.FlowWithRepaLoss(network(1, DEEP), Head(), 1), inputs(2)
    _, repa = objective(images, torch.randn_like(images), sigmas, text, torch.zeros(2, 8, 2))
    repa.backward()
    first, second = objective.model.single_blocks
    assert all(p.grad is not None for p in [*first.parameters(), *objective.head.parameters()])
    assert all(p.grad is None for p in second.parameters())


def train(out: Path, steps: int, **settings: object) -> FluxTransformer:
    recipe = flow.FlowRecipe(batch=4, warmup=2, compiled=False, **settings)
    flow.train_flow(TrainingRun(out, steps), Latents(), Encoders(), build, recipe)
    return load_transformer(out, dtype=torch.float32)


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    """Also when it is interrupted after two of three steps."""
    whole = train(tmp_path / "a.safetensors", 3, decay_share=0.0)
    train(tmp_path / "b.safetensors", 2, decay_share=0.0)
    resumed = train(tmp_path / "b.safetensors", 3, decay_share=0.0)
    assert all(torch.equal(x, y) for x, y in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_bf16_writes_float32_weights(tmp_path: Path) -> None:
    train(tmp_path / "a.safetensors", 2, bf16=True)
    model = load_transformer(tmp_path / "a.safetensors")
    assert model.spec == DEEP and model.dtype == torch.float32


@pytest.mark.slow
def test_it_learns(tmp_path: Path) -> None:
    """The loss of the same noise falls by more than a quarter of a fresh model's within 120 small steps."""
    model = train(tmp_path / "a.safetensors", 120)
    images = Latents().latents
    torch.manual_seed(9)
    noise, sigmas = torch.randn_like(images), torch.full((4,), 0.5)
    with torch.no_grad():
        text = Encoders().encode([f"latent {k}" for k in range(4)])
        velocity = flow.predict_velocity(model, 0.5 * images + 0.5 * noise, sigmas, text)
    assert (velocity - (noise - images)).square().mean() < 0.75 * (noise - images).square().mean()
