"""Guidance distillation: the guided teacher against two passes, the student's start, and that it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rectiflux.flux_core import FluxTransformer, load_transformer
from rectiflux.flux_core.model.spec import Conditioning
from rectiflux.flux_core.train import guidance_distillation as guidance
from rectiflux.flux_core.train.flow import predict_velocity
from rectiflux.flux_core.train.loop import TrainingRun

from .tiny import TINY, Encoders, Latents, inputs, network


def test_the_guided_teacher_is_two_passes() -> None:
    noisy, sigmas, text = inputs(3)
    empty, scales = Conditioning(text.txt + 1, text.pooled - 1), torch.tensor([1.0, 3.0, 0.0])
    with torch.no_grad():
        found = guidance.guided_teacher(network(), noisy, sigmas, text, empty, scales)
        with_prompt = predict_velocity(network(), noisy, sigmas, text)
        without = predict_velocity(network(), noisy, sigmas, empty)
    expected = without + scales[:, None, None, None] * (with_prompt - without)
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_new_student_is_its_teacher_at_every_scale() -> None:
    noisy, sigmas, text = inputs(2)
    student = guidance.with_guidance(network())
    assert student.spec == replace(TINY, guidance_embed=True)
    with torch.no_grad():
        for scale in (1.0, 4.0):
            found = predict_velocity(student, noisy, sigmas, text, torch.full((2,), scale))
            assert torch.allclose(found, predict_velocity(network(), noisy, sigmas, text), atol=1e-6)


def test_a_distilled_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match="guidance embedder"):
        guidance.with_guidance(FluxTransformer(replace(TINY, guidance_embed=True)))


@pytest.mark.slow
def test_it_learns(tmp_path: Path) -> None:
    """In 60 small steps the error against the guided teacher at scale 4 falls by a third."""
    out, recipe = tmp_path / "dev.safetensors", guidance.GuidanceRecipe(batch=8, warmup=2, compiled=False)
    guidance.train_guidance(TrainingRun(out, 60), Latents(), Encoders(), network(), recipe)
    noisy, sigmas, scales = inputs(4)[0], torch.full((4,), 0.7), torch.full((4,), 4.0)
    encoders = Encoders()
    text, empty = encoders.encode([f"latent {k}" for k in range(4)]), encoders.encode([""] * 4)
    with torch.no_grad():
        errors = [
            guidance.GuidanceLoss(student, network())(noisy, sigmas, text, empty, scales).item()
            for student in (guidance.with_guidance(network()), load_transformer(out, dtype=torch.float32))
        ]
    assert errors[1] < 0.67 * errors[0]
