"""Distribution matching: the student's rollout and the gradient of its loss against their formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rectiflux.flux_core import FluxTransformer, load_transformer
from rectiflux.flux_core.train import distribution_matching as matching
from rectiflux.flux_core.train.flow import predict_velocity
from rectiflux.flux_core.train.loop import TrainingRun
from rectiflux.flux_core.train.pairs import PairInputs, PairSet, write_pairs

from .tiny import TINY, Encoders, inputs, network


def test_a_rollout_is_steps_of_euler() -> None:
    """After 2 of 4 steps: sigma 1/2, and the state of two Euler steps of 1/4."""
    noise, _, text = inputs(2)
    student = network()
    state, sigma = matching.rollout(student, noise, text, 2)
    with torch.no_grad():
        x = noise - 0.25 * predict_velocity(student, noise, torch.ones(2), text)
        x = x - 0.25 * predict_velocity(student, x, torch.full((2,), 0.75), text)
    assert torch.allclose(state, x, atol=1e-5) and sigma.tolist() == [0.5, 0.5]


def test_the_gradient_points_from_critic_to_teacher_and_vanishes_where_they_agree() -> None:
    noisy, _, text = inputs(2)
    start, sigmas, fresh = torch.ones(2), torch.full((2,), 0.5), torch.randn(2, 16, 4, 8)
    same = matching.DistributionMatching(network(), network(), network())
    loss, _ = same.student_loss(noisy, start, fresh, sigmas, text)
    assert loss.item() == pytest.approx(0.0, abs=1e-8)
    other = network(9)
    losses = matching.DistributionMatching(network(), network(), other)
    loss, denoised = losses.student_loss(noisy, start, fresh, sigmas, text)
    with torch.no_grad():
        again = 0.5 * denoised + 0.5 * fresh
        real = again - 0.5 * predict_velocity(other, again, sigmas, text)
        fake = again - 0.5 * predict_velocity(network(), again, sigmas, text)
        distance = (denoised - real).abs().mean(dim=(1, 2, 3), keepdim=True)
    (gradient,) = torch.autograd.grad(loss, denoised)
    assert torch.allclose(gradient * denoised.numel(), (fake - real) / distance, atol=1e-3)


def test_a_student_without_a_guidance_embedder_comes_of_a_teacher_with_one(tmp_path: Path) -> None:
    """Two steps, half of each batch pairs, the other half new prompts."""

    def draw(k: int, size: int) -> PairInputs:
        return PairInputs(inputs(size)[0], ["a pair"] * size, [""] * size)

    prompts: list[str] = []

    def draw_prompt(rng: object) -> str:
        prompts.append(f"new {len(prompts)}")
        return prompts[-1]

    write_pairs(tmp_path / "pairs", 4, draw, lambda _, noise: -noise)
    out, teacher = tmp_path / "schnell.safetensors", FluxTransformer(replace(TINY, guidance_embed=True))
    data = matching.MatchingData(PairSet(tmp_path / "pairs"), draw_prompt)
    recipe = matching.MatchingRecipe(batch=4, warmup=2, compiled=False)
    student = network()
    matching.train_distribution_matching(TrainingRun(out, 2), data, Encoders(), student, teacher, recipe)
    assert load_transformer(out).spec == TINY and len(prompts) == 4
