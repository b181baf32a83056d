"""The schedule against diffusers' scheduler, the group law of the shift, and ComfyUI's `denoise`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from rectiflux.flux_core.sampling.schedule import SHIFTS, make_sigmas, mu_for_tokens, shift_sigmas

TOKENS = (1, 16, 64, 256, 1024, 4096, 9216, 16384)


def diffusers_sigmas(steps: int, seq_len: int) -> torch.Tensor:
    """The sigmas of FluxPipeline (diffusers 0.42, pipeline_flux.py)."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(seq_len))
    return scheduler.sigmas


@pytest.mark.parametrize("seq_len", TOKENS)
def test_mu_is_flux(seq_len: int) -> None:
    assert mu_for_tokens(seq_len) == pytest.approx(calculate_shift(seq_len), abs=1e-12)


def test_mu_at_the_two_sizes_that_define_it() -> None:
    assert (mu_for_tokens(256), mu_for_tokens(4096)) == (0.5, pytest.approx(1.15, abs=1e-12))


@pytest.mark.parametrize("seq_len", TOKENS)
@pytest.mark.parametrize("steps", [1, 2, 20, 28, 50, 1000])
def test_sigmas_are_diffusers(steps: int, seq_len: int) -> None:
    torch.testing.assert_close(
        make_sigmas(steps, seq_len), diffusers_sigmas(steps, seq_len), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("mu", [0.5, 1.15, 3.0])
def test_fixed_mu_is_the_formula(mu: float) -> None:
    """sigma' = e^mu / (e^mu + 1/sigma - 1), written out in Python's floats."""
    expected = [math.exp(mu) / (math.exp(mu) + 1 / (i / 7) - 1) for i in range(7, 0, -1)] + [0.0]
    assert make_sigmas(7, 64, shift="fixed", mu=mu).tolist() == pytest.approx(expected, abs=1e-7)


def test_fixed_mu_is_1_15_unless_given() -> None:
    assert torch.equal(make_sigmas(9, 64, shift="fixed"), make_sigmas(9, 64, shift="fixed", mu=1.15))
    torch.testing.assert_close(make_sigmas(9, 64, shift="fixed"), make_sigmas(9, 4096), rtol=0, atol=1e-7)


def test_no_shift_is_even_steps() -> None:
    assert make_sigmas(4, 4096, shift="none").tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("denoise", [1.0, 0.6, 0.05])
def test_sigmas_have_the_documented_form(shift: str, denoise: float) -> None:
    sigmas = make_sigmas(12, 900, shift=shift, mu=0.8, denoise=denoise)
    assert sigmas.shape == (13,)
    assert sigmas.dtype == torch.float32
    assert sigmas.device.type == "cpu"
    assert sigmas[-1] == 0.0
    assert (sigmas.diff() < 0).all()
    assert (sigmas[0] == 1.0) == (denoise == 1.0)


def test_shifts_add_up_and_have_an_inverse() -> None:
    """Group law: shift(b) after shift(a) is shift(a + b); the inverse of shift(a) is shift(-a)."""
    sigmas = torch.linspace(0, 1, 101, dtype=torch.float64)
    for a, b in [(0.5, 0.65), (1.15, -0.4), (-2.0, 3.5), (7.0, 4.0)]:
        torch.testing.assert_close(
            shift_sigmas(shift_sigmas(sigmas, a), b), shift_sigmas(sigmas, a + b), rtol=1e-12, atol=1e-15
        )
        torch.testing.assert_close(shift_sigmas(shift_sigmas(sigmas, a), -a), sigmas, rtol=1e-12, atol=1e-12)
    assert torch.equal(shift_sigmas(sigmas, 0.0), sigmas)


def test_a_shift_moves_the_logit() -> None:
    sigmas = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    torch.testing.assert_close(
        shift_sigmas(sigmas, 1.3).logit(), sigmas.logit() + 1.3, rtol=1e-10, atol=1e-10
    )


def test_ends_are_unchanged_at_the_largest_shifts() -> None:
    ends = torch.tensor([1.0, 0.0])
    for mu in (-50.0, 50.0):
        assert torch.equal(shift_sigmas(ends, mu), ends)


@pytest.mark.parametrize(("steps", "denoise"), [(20, 0.5), (20, 0.3), (1, 0.1), (7, 0.99), (4, 1.0)])
def test_denoise_keeps_the_tail_of_a_longer_schedule(steps: int, denoise: float) -> None:
    """As in ComfyUI's BasicScheduler: the last `steps` of int(steps / denoise) steps."""
    longer = make_sigmas(int(steps / denoise), 256)
    assert torch.equal(make_sigmas(steps, 256, denoise=denoise), longer[-(steps + 1) :])


def test_wrong_values_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        make_sigmas(0, 256)
    for denoise in (0.0, -0.5, 1.01, math.nan):
        with pytest.raises(ValueError, match=f"denoise .* got {denoise}"):
            make_sigmas(4, 256, denoise=denoise)
    with pytest.raises(ValueError, match="by size, none, fixed, got 'double'"):
        make_sigmas(4, 256, shift="double")
    with pytest.raises(ValueError, match="at least one image token, got 0"):
        make_sigmas(4, 0)
    for mu in (50.1, -50.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"mu .* got {mu}"):
            make_sigmas(4, 256, shift="fixed", mu=mu)
