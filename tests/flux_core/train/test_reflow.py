"""Reflow: folded guidance, its noise levels and loss against formulas, and that it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rectiflux.flux_core import FluxTransformer, load_transformer
from rectiflux.flux_core.train import reflow
from rectiflux.flux_core.train.flow import predict_velocity
from rectiflux.flux_core.train.loop import TrainingRun
from rectiflux.flux_core.train.pairs import PairInputs, PairSet, write_pairs

from .tiny import TINY, Encoders, inputs, network


def test_folded_guidance_is_the_guidance_it_folds() -> None:
    noisy, sigmas, text = inputs(2)
    torch.manual_seed(5)
    dev = FluxTransformer(replace(TINY, guidance_embed=True))
    folded = reflow.fold_guidance(dev, 3.0)
    assert folded.guidance_in is None
    with torch.no_grad():
        expected = predict_velocity(dev, noisy, sigmas, text, torch.full((2,), 3.0))
        other = predict_velocity(dev, noisy, sigmas, text, torch.full((2,), 1.0))
        found = predict_velocity(folded, noisy, sigmas, text)
    assert torch.allclose(found, expected, atol=1e-5) and not torch.allclose(found, other, atol=1e-3)


def test_sigmas_rise_to_both_ends_and_a_tenth_are_one() -> None:
    """The arcsine law has a quarter of its mass below sin^2(pi/8) = 0.1464 and its median at 1/2."""
    torch.manual_seed(0)
    sigmas = reflow.end_heavy_sigmas(100_000)
    assert (sigmas == 1).float().mean().item() == pytest.approx(0.1, abs=0.01)
    inner = sigmas[sigmas < 1]
    quartiles = inner.quantile(torch.tensor([0.25, 0.5, 0.75]))
    assert quartiles.tolist() == pytest.approx([0.1464, 0.5, 0.8536], abs=0.01)


def test_pseudo_huber_is_its_formula() -> None:
    """sqrt(e^2 + c^2) - c of root mean square errors 0 and 3 with c = 4: (0 + 1) / 2."""
    error = torch.stack([torch.zeros(2, 2), torch.full((2, 2), 3.0)])
    assert reflow.pseudo_huber(error, 4.0).item() == pytest.approx(0.5, rel=1e-6)


@pytest.mark.slow
def test_it_learns(tmp_path: Path) -> None:
    """In 60 small steps the loss of pairs whose latents are half their noise falls by a quarter."""

    def draw(k: int, size: int) -> PairInputs:
        noise = torch.randn(size, 16, 4, 8, generator=torch.Generator().manual_seed(k))
        return PairInputs(noise, [f"{i}" for i in range(size)], [""] * size)

    write_pairs(tmp_path / "pairs", 8, draw, lambda _, noise: 0.5 * noise)
    out, recipe = tmp_path / "reflow.safetensors", reflow.ReflowRecipe(batch=8, warmup=2, compiled=False)
    pairs, student = PairSet(tmp_path / "pairs"), network()
    reflow.train_reflow(TrainingRun(out, 60), pairs, Encoders(), student, recipe)
    noise = draw(0, 8).noise
    text, sigmas = Encoders().encode([f"{i}" for i in range(8)]), torch.full((8,), 0.8)
    with torch.no_grad():
        losses = [
            reflow.ReflowLoss(each, recipe.huber)(0.5 * noise, noise, sigmas, text).item()
            for each in (network(), load_transformer(out, dtype=torch.float32))
        ]
    assert losses[1] < 0.75 * losses[0]
