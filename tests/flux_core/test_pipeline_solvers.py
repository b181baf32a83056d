"""The pipeline with solvers that know their sigmas beforehand, that find them, and that draw noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rectiflux.benchmarks.reference.models import flux_transformer, relative_error, text
from rectiflux.flux_core.pipeline import (
    Guidance,
    SampleRequest,
    VelocityRequest,
    draw_noise,
    guided_velocity,
    sample,
    text_to_image,
)
from rectiflux.flux_core.sampling.schedule import make_sigmas
from rectiflux.flux_core.sampling.solver import SOLVERS, DormandPrince, EulerAncestral, Report

from .test_pipeline import models

PLANNED = [solver for solver in SOLVERS.values() if solver.evaluation_sigmas([1.0, 0.0])]
EACH_PLANNED = pytest.mark.parametrize("solver", PLANNED, ids=lambda solver: solver.name)
"""The solvers that know their sigmas beforehand."""


def test_sigmas_that_are_not_known_beforehand_are_prepared_as_they_come() -> None:
    """Any sigma, the same velocity, to the rounding of one large matrix product against several small ones;
    text and rotary table are still prepared once, modulations once per new sigma."""
    model = flux_transformer()
    x = draw_noise(3, 2, 4, 6)
    sigmas = [0.9, 0.123, 0.5]
    known = guided_velocity(model, VelocityRequest(text(1), sigmas, 4, 6, 2, Guidance(text(2), 2.0)))
    calls = {name: counted(model, name) for name in ("project_text", "rope", "modulate")}
    found = guided_velocity(model, VelocityRequest(text(1), None, 4, 6, 2, Guidance(text(2), 2.0)))
    for sigma in (0.9, 0.9, 0.123, 0.5, 0.9):
        assert relative_error(found(x, sigma), known(x, sigma)) < 1e-6
    assert {name: len(rows) for name, rows in calls.items()} == {"project_text": 1, "rope": 1, "modulate": 4}


def counted(model, name: str) -> list[int]:
    """What grows by one at every call of one of the model's methods."""
    calls: list[int] = []
    method = getattr(model, name)
    setattr(model, name, lambda *args: calls.append(1) or method(*args))
    return calls


def test_an_adaptive_solver_paints_what_a_fine_schedule_does() -> None:
    """Through the whole of `sample`, negative prompt and all; it also tells what it did. The random network
    is made to look less at sigma, which it resolves to a thousandth."""
    model, noise = flux_transformer(), draw_noise(9, 2, 4, 4)
    model.time_in.out_layer.weight.data.mul_(0.01)
    reports: list[Report] = []
    adaptive = SampleRequest(
        text(1),
        noise,
        torch.zeros_like(noise),
        make_sigmas(4, 4),
        DormandPrince(rtol=1e-4, atol=1e-4),
        Guidance(text(2), 2.0),
        on_report=reports.append,
    )
    fine = replace(adaptive, sigmas=make_sigmas(80, 4), solver=SOLVERS["rk4"], on_report=None)
    assert relative_error(sample(model, adaptive), sample(model, fine)) < 1e-3
    assert reports[0].solver == "dormand_prince" and reports[0].evaluations < 4 * 80


def test_the_steps_noise_has_a_seed() -> None:
    """`sample` draws it from its own seed, `text_to_image` from the picture's."""
    model, noise = flux_transformer(), draw_noise(9, 1, 4, 4)
    request = SampleRequest(
        text(1), noise, torch.zeros_like(noise), make_sigmas(4, 4), SOLVERS["euler_ancestral"]
    )
    first, again, other = (sample(model, replace(request, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other)
    plain, without = (
        sample(model, replace(request, solver=solver))
        for solver in (SOLVERS["euler"], EulerAncestral(eta=0.0))
    )
    assert torch.equal(plain, without) and not torch.allclose(first, plain)
    ours, reports = models(), []
    asked = {"width": 16, "height": 16, "steps": 3, "seed": 5, "solver": "euler_ancestral"}
    picture = text_to_image(ours, "a fox", **asked, on_report=reports.append)
    assert torch.equal(picture, text_to_image(ours, "a fox", **asked))
    assert reports == [Report("euler_ancestral", 3, 3, 0, None, None)]
