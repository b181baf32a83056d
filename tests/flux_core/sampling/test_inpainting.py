"""Sampling with a noise mask: what lies outside stays, and soft masks follow ComfyUI's rule."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from rectiflux.benchmarks.reference.models import flux_transformer, text
from rectiflux.flux_core.pipeline import (
    Guidance,
    SampleRequest,
    VelocityRequest,
    draw_noise,
    guided_velocity,
    latent_mask,
    sample,
)
from rectiflux.flux_core.sampling.schedule import make_sigmas
from rectiflux.flux_core.sampling.solver import SOLVERS, Solver, Step

ALL = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


@ALL
@pytest.mark.parametrize("denoise", [1.0, 0.5])
def test_outside_the_mask_the_latent_stays(solver: Solver, denoise: float) -> None:
    """The mask comes at the picture's size; where it is 0 every step and the end show the clean latent."""
    noise, latent = draw_noise(1, 2, 4, 6), draw_noise(2, 2, 4, 6)
    mask = torch.zeros(32, 48)
    mask[:, :24] = 1.0
    steps: list[Step] = []
    end = sample(
        flux_transformer(),
        SampleRequest(
            text(1),
            noise,
            latent,
            make_sigmas(3, 6, denoise=denoise),
            solver,
            Guidance(text(2), 2.0),
            noise_mask=mask,
            on_step=steps.append,
        ),
    )
    for picture in (end, *(step.denoised for step in steps)):
        torch.testing.assert_close(picture[..., 3:], latent[..., 3:], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(picture[..., :3], latent[..., :3], atol=0.1)


def test_masks_of_one_are_no_mask() -> None:
    noise, latent, model = draw_noise(1, 1, 4, 4), draw_noise(2, 1, 4, 4), flux_transformer()
    sigmas = make_sigmas(3, 4, denoise=0.7)
    plain = sample(model, SampleRequest(text(1), noise, latent, sigmas, SOLVERS["heun"]))
    masked = sample(
        model,
        SampleRequest(
            text(1), noise, latent, sigmas, SOLVERS["heun"], noise_mask=torch.ones(1, 1, 8, 8), on_step=None
        ),
    )
    torch.testing.assert_close(masked, plain, rtol=1e-4, atol=1e-5)


def test_soft_masks_follow_comfyui() -> None:
    """ComfyUI's rule written out for Euler: mix before the model, mix what it denoised, step towards that."""
    noise, latent, model = draw_noise(1, 1, 4, 4), draw_noise(2, 1, 4, 4), flux_transformer()
    mask = torch.linspace(0, 1, 16).reshape(1, 4, 4)
    sigmas = make_sigmas(4, 4, denoise=0.8)
    velocity = guided_velocity(model, VelocityRequest(text(1), sigmas[:-1].tolist(), 4, 4, 1))
    m = mask[None]
    x = (1 - sigmas[0]) * latent + sigmas[0] * noise
    for sigma, after in pairwise(sigmas.tolist()):
        seen = x * m + (sigma * noise + (1 - sigma) * latent) * (1 - m)
        denoised = (seen - sigma * velocity(seen, sigma)) * m + latent * (1 - m)
        x = x + (x - denoised) / sigma * (after - sigma)
    ours = sample(
        model, SampleRequest(text(1), noise, latent, sigmas, SOLVERS["euler"], noise_mask=mask, on_step=None)
    )
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)


def test_masks_are_resized_bilinearly() -> None:
    latent = torch.zeros(2, 16, 2, 2)
    mask = torch.zeros(2, 4, 4)
    mask[1, :2, :2] = 1.0
    mask[1, 3, 3] = 1.0
    assert latent_mask(mask, latent)[:, 0].tolist() == [[[0, 0], [0, 0]], [[1, 0], [0, 0.25]]]
    assert latent_mask(mask[0], latent).shape == (1, 1, 2, 2)
