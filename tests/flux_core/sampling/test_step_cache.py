"""A cache skips what it knows, forecasts straight lines exactly, and skipping nothing it changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import rectiflux
import torch
from rectiflux.benchmarks.reference.models import flux_transformer, text
from rectiflux.flux_core.pipeline import (
    Guidance,
    SampleRequest,
    VelocityRequest,
    draw_noise,
    guided_velocity,
    sample,
)
from rectiflux.flux_core.sampling.schedule import make_sigmas
from rectiflux.flux_core.sampling.solver import solver_named
from rectiflux.flux_core.sampling.step_cache import METHODS, Caching, StepCache
from rectiflux.flux_core.weights import load_text_encoders, load_transformer
from torch import Tensor

MODELS = Path(rectiflux.__file__).parent / "models"
ONES = torch.ones(1, 2, 3)


def remembered(method: str, threshold: float = 0.1, batch: int = 1) -> StepCache:
    """A memory of two computed steps, at sigma 1 and 0.8, of a first block that changed by 1."""
    memory = Caching(method, threshold).new_cache()
    for sigma, added in ((1.0, 5.0), (0.8, 6.0)):
        assert memory.lookup(sigma, torch.ones(batch, 2, 3) * (1 + 10 * sigma)) is None
        memory.store(sigma, torch.full((batch, 2, 3), added))
    return memory


def guessed(memory: StepCache, sigma: float, *changes: float) -> Tensor | None:
    return memory.lookup(sigma, torch.stack([torch.full((2, 3), change) for change in changes]))


def test_a_forecast_is_exact_on_a_straight_line() -> None:
    memory = remembered("forecast")
    for sigma, added in ((0.7, 6.5), (0.6, 7.0), (0.2, 9.0)):
        found = guessed(memory, sigma, 9.0)
        assert found is not None and torch.allclose(found, torch.full((1, 2, 3), added))
    assert (memory.skipped, memory.computed) == (3, 2)


def test_the_first_block_cache_gives_the_last_step() -> None:
    memory = remembered("first block")
    found = guessed(memory, 0.3, 9.0)
    assert found is not None and torch.equal(found, torch.full((1, 2, 3), 6.0))
    single = Caching("first block", 0.1).new_cache()
    assert guessed(single, 1.0, 9.0) is None
    single.store(1.0, 5 * ONES)
    assert guessed(single, 0.9, 9.0) is not None, "one computed step is enough"


@pytest.mark.parametrize("method", METHODS)
def test_the_threshold_is_the_change_over_the_size(method: str) -> None:
    """The first block's change was 9 at the last computed step."""
    assert guessed(remembered(method), 0.6, 9.8) is not None
    assert guessed(remembered(method), 0.6, 10.0) is None
    assert guessed(remembered(method), 0.6, 8.0) is None
    assert guessed(remembered(method, 0.0), 0.6, 9.0) is None


def test_the_picture_that_changes_most_decides() -> None:
    assert guessed(remembered("forecast", batch=2), 0.6, 9.0, 9.5) is not None
    assert guessed(remembered("forecast", batch=2), 0.6, 9.0, 10.5) is None


def test_another_run_or_another_size_begins_anew() -> None:
    memory = remembered("first block")
    assert guessed(memory, 1.0, 9.0) is None, "a sigma above the last one is another run"
    memory = remembered("first block")
    assert memory.lookup(0.6, torch.full((1, 4, 3), 9.0)) is None
    memory.store(0.6, torch.ones(1, 4, 3))
    assert memory.lookup(0.5, torch.full((1, 4, 3), 9.0)) is not None


def test_two_evaluations_at_one_sigma_are_one_point() -> None:
    memory = remembered("forecast")
    assert guessed(memory, 0.8, 20.0) is None
    memory.store(0.8, 7 * ONES)
    found = guessed(memory, 0.6, 20.0)
    assert found is not None and torch.allclose(found, 9 * ONES), "the later one counts"


def run(caching: Caching | None, steps: int, cfg_scale: float = 1.0) -> tuple[Tensor, list[StepCache]]:
    memories: list[StepCache] = []

    def memory() -> StepCache:
        assert caching is not None
        memories.append(caching.new_cache())
        return memories[-1]

    noise = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(3))
    result = sample(
        flux_transformer(),
        SampleRequest(
            text(0),
            noise,
            torch.zeros_like(noise),
            torch.linspace(1, 0, steps + 1),
            solver_named("euler"),
            Guidance(text(1, length=4) if cfg_scale != 1.0 else None, cfg_scale),
            new_cache=None if caching is None else memory,
        ),
    )
    return result, memories


@pytest.mark.parametrize("method", METHODS)
def test_without_skipping_nothing_changes(method: str) -> None:
    plain, _ = run(None, 6)
    found, memories = run(Caching(method, 0.0), 6)
    assert torch.equal(found, plain)
    assert [(memory.skipped, memory.computed) for memory in memories] == [(0, 6)]


@pytest.mark.parametrize("method", METHODS)
def test_what_is_skipped_is_not_computed(method: str) -> None:
    """A threshold that is always met: only as many steps are computed as the method needs to know."""
    found, memories = run(Caching(method, 100.0), 8)
    needed = 2 if method == "forecast" else 1
    assert [(memory.skipped, memory.computed) for memory in memories] == [(8 - needed, needed)]
    model, calls = flux_transformer(), []
    for block in (*model.double_blocks[1:], *model.single_blocks):
        block.register_forward_hook(lambda *_: calls.append(1))
    memory = Caching(method, 100.0).new_cache()
    noise = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(3))
    sigmas = [1.0, 0.75, 0.5, 0.25]
    with torch.no_grad():
        velocity = guided_velocity(model, VelocityRequest(text(0), sigmas, 4, 4, 1, new_cache=lambda: memory))
        for sigma in sigmas:
            assert velocity(noise, sigma).isfinite().all()
    assert len(calls) == needed * (len(model.double_blocks) - 1 + len(model.single_blocks))
    assert found.isfinite().all()


def test_texts_that_go_one_after_the_other_have_a_memory_each() -> None:
    plain, _ = run(None, 5, cfg_scale=3.0)
    found, memories = run(Caching("forecast", 0.0), 5, cfg_scale=3.0)
    assert torch.equal(found, plain)
    assert [memory.computed for memory in memories] == [5, 5]


@pytest.mark.slow
def test_a_forecast_comes_nearer_to_the_full_run_than_the_last_step() -> None:
    """mini-dev in 28 steps: of as many skipped steps the forecast keeps more of the picture."""
    texts = MODELS / "text_encoders"
    files = texts / "rectiflux-mini-clip.safetensors", texts / "rectiflux-mini-t5.safetensors"
    encoded = load_text_encoders(*files, dtype=torch.float32).encode(["a red heart left of a blue star"])
    model = load_transformer(MODELS / "diffusion_models" / "rectiflux-mini-dev.safetensors", torch.float32)
    sigmas = make_sigmas(28, 64)
    noise = draw_noise(1, 1, 16, 16)

    def paint(memory: StepCache | None) -> Tensor:
        prompt = replace(encoded, guidance=3.5)
        latent, make = torch.zeros_like(noise), None if memory is None else lambda: memory
        return sample(
            model, SampleRequest(prompt, noise, latent, sigmas, solver_named("euler"), new_cache=make)
        )

    full, errors = paint(None), {}
    for method in METHODS:
        memory = Caching(method, 0.12).new_cache()
        errors[method] = float((paint(memory) - full).square().mean().sqrt())
        assert memory.skipped >= 6 and memory.skipped + memory.computed == 28
    assert errors["forecast"] < 0.7 * errors["first block"] < 0.05


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="steps are cached by forecast or first block, got 'tea'"):
        Caching("tea")
    with pytest.raises(ValueError, match="the threshold of a cache must be at least 0, got -1"):
        Caching("forecast", -1)
    with pytest.raises(ValueError, match="must be at least 0, got nan"):
        Caching("forecast", float("nan"))
