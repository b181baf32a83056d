"""Sentences for what a person may wire or type wrongly: what, rule, got, what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rectiflux.host.files import Folders
from rectiflux.nodes import host_embedded as _host

from . import graphs
from .test_nodes import FILES, call, latent

TXT, POOLED = torch.zeros(1, 16, 32), {"pooled_output": torch.zeros(1, 64)}


@pytest.fixture(scope="module")
def wires() -> dict[str, Any]:
    """Everything that FLUX Sampler takes, without a model: it must complain before it would need one."""
    return {
        "model": None,
        "positive": [[TXT, POOLED]],
        "noise": call("RectifluxNoise", seed=1),
        "sampler": call("RectifluxSolver", solver="euler"),
        "sigmas": torch.tensor([1.0, 0.5, 0.0]),
        "latent": latent(),
        "cfg_scale": 1.0,
    }


LATENTS = [
    (torch.zeros(1, 4, 8, 8), "a FLUX.1 latent has 16 channels, got 4 channels; use Empty FLUX Latent"),
    (torch.zeros(1, 16, 3, 8, 8), "got a tensor of shape [1, 16, 3, 8, 8]"),
    (torch.zeros(1, 16, 9, 8), "sides must be multiples of 16, got a latent of 64x72 pixels"),
]


@pytest.mark.parametrize(("samples", "sentence"), LATENTS)
def test_latents_of_other_models(wires: dict[str, Any], samples: torch.Tensor, sentence: str) -> None:
    wrong = {"samples": samples}
    for node in (
        lambda: call("RectifluxSampler", **{**wires, "latent": wrong}),
        lambda: call("RectifluxSchedule", latent=wrong, steps=4, denoise=1.0, shift="by size", mu=1.15),
        lambda: call("RectifluxVAEDecode", samples=wrong, vae=None),
        lambda: wires["noise"].generate_noise(wrong),
    ):
        with pytest.raises(ValueError) as refused:
            node()
        assert sentence in str(refused.value)


SIGMAS = [
    ([1.0], "sampling needs at least one step, got 0 steps; set steps to 1 or more"),
    ([], "sampling needs at least one step, got 0 steps"),
    (
        [14.6, 3.0, 0.0],
        "FLUX.1's sigmas lie between 0 and 1, got 14.6; this schedule belongs to another kind",
    ),
    ([0.5, -0.1], "lie between 0 and 1, got -0.1"),
    ([0.0, 0.5, 1.0], "sigmas must descend, got 0 before 0.5; use Rectified-Flow Schedule"),
    ([1.0, 0.5, 0.5, 0.0], "sigmas must descend, got 0.5 before 0.5"),
]


@pytest.mark.parametrize(("sigmas", "sentence"), SIGMAS)
def test_sigmas_of_other_models(wires: dict[str, Any], sigmas: list[float], sentence: str) -> None:
    with pytest.raises(ValueError) as refused:
        call("RectifluxSampler", **{**wires, "sigmas": torch.tensor(sigmas)})
    assert sentence in str(refused.value)


CONDITIONINGS = [
    ([[TXT, {}]], "the positive conditioning has no pooled CLIP vector, so it is not FLUX.1's; encode"),
    ([], "the positive conditioning is empty; connect FLUX Prompt"),
    ([[TXT, POOLED]] * 2, "the positive conditioning combines 2 prompts, FLUX Sampler takes one here"),
    ([[TXT[..., :7], POOLED]], "the model reads text of width 32, got 7"),
    ([[TXT, {"pooled_output": torch.zeros(1, 9)}]], "the model reads a pooled vector of width 64, got 9"),
]


@pytest.mark.parametrize(("entries", "sentence"), CONDITIONINGS)
def test_conditionings_of_other_models(
    embedded: Folders, wires: dict[str, Any], entries: Any, sentence: str
) -> None:
    model = graphs.run(FILES, "model")[0]
    with pytest.raises(ValueError) as refused:
        call("RectifluxSampler", **{**wires, "model": model, "positive": entries})
    assert sentence in str(refused.value)
    if "positive" in sentence:
        with pytest.raises(ValueError, match="the negative conditioning"):
            call("RectifluxSampler", **{**wires, "model": model, "negative": entries, "cfg_scale": 2.0})


def test_wires_of_the_wrong_kind(embedded: Folders, wires: dict[str, Any]) -> None:
    model = graphs.run(FILES, "model")[0]
    with pytest.raises(
        TypeError, match="the MODEL must come from Load FLUX Model here, got NoneType; connect"
    ):
        call("RectifluxSampler", **wires)
    with pytest.raises(TypeError, match="the SAMPLER must come from ODE Solver here, got str; connect"):
        call("RectifluxSampler", **{**wires, "model": model, "sampler": "euler"})
    with pytest.raises(TypeError, match="the VAE must come from Load FLUX VAE here, got EmbeddedModel"):
        call("RectifluxVAEDecode", samples=latent(), vae=model)
    with pytest.raises(TypeError, match="the VAE must come from Load FLUX VAE"):
        call("RectifluxVAEEncode", image=torch.zeros(1, 16, 16, 3), vae=model)
    with pytest.raises(
        TypeError, match="the CLIP must come from Load FLUX Text Encoders here, got EmbeddedModel"
    ):
        call("RectifluxTextEncode", clip=model, prompt="x", guidance=3.5)


def test_sides_that_are_no_multiples_of_16() -> None:
    with pytest.raises(ValueError, match="positive multiples of 16, got 100x64"):
        latent(100, 64)
    with pytest.raises(ValueError, match="to be encoded, got 100x70; resize or crop it to 96x64"):
        call("RectifluxVAEEncode", image=torch.zeros(1, 70, 100, 3), vae=None)
    with pytest.raises(ValueError, match="3 colour channels"):
        call("RectifluxVAEEncode", image=torch.zeros(1, 64, 64, 1), vae=None)


def test_zero_steps_and_unknown_names() -> None:
    plan = {"latent": latent(), "denoise": 1.0, "shift": "by size", "mu": 1.15}
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        call("RectifluxSchedule", **plan, steps=0)
    with pytest.raises(ValueError, match="solver must be one of euler"):
        call("RectifluxSolver", solver="ddim")


def test_settings_of_solvers_out_of_bounds() -> None:
    """The editor keeps to the bounds, a script may not."""
    with pytest.raises(ValueError, match="rtol must be a number above 0, got 0.0; 0.02 is usual"):
        call("RectifluxAdaptiveSolver", rtol=0.0, atol=0.1, max_evaluations=100)
    with pytest.raises(ValueError, match="max_evaluations must be at least 9, got 3"):
        call("RectifluxAdaptiveSolver", rtol=0.1, atol=0.1, max_evaluations=3)
    with pytest.raises(ValueError, match="eta, the amount of noise, must lie between 0 and 1, got 2.0"):
        call("RectifluxStochasticSolver", eta=2.0)


def test_an_adaptive_solver_that_runs_out_of_model_calls(embedded: Folders) -> None:
    prompt = graphs.text_to_image(FILES, steps=2)
    settings = {"rtol": 0.00001, "atol": 0.00001, "max_evaluations": 20}
    prompt["solver"] = graphs.node("RectifluxAdaptiveSolver", **settings)
    with pytest.raises(
        ValueError, match="has used its 20 evaluations and is at sigma .* raise rtol and atol"
    ):
        graphs.run(prompt, "sample")


def test_files_that_are_not_there_or_out_of_bounds(embedded: Folders) -> None:
    with pytest.raises(FileNotFoundError, match="there is no gone.safetensors in models/vae; put it there"):
        call("RectifluxVAELoader", vae_name="gone.safetensors")
    for name in ("../diffusion_models/tiny.safetensors", "/etc/passwd"):
        with pytest.raises(ValueError, match="a model's name must stay in its folder"):
            _host.model_path("vae", name)


def test_files_of_another_kind(embedded: Folders, tiny_models: Any) -> None:
    (tiny_models / "vae" / "wrong.safetensors").write_bytes(
        (tiny_models / "text_encoders" / "tiny-t5.safetensors").read_bytes()
    )
    with pytest.raises(ValueError, match="wrong.safetensors is a T5 text encoder, not a VAE"):
        call("RectifluxVAELoader", vae_name="wrong.safetensors")
