"""Wrong wires and values: refused before the transformer runs, with the value and a remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rectiflux.host.files import Folders
from rectiflux.nodes.host import current_host

from . import graphs
from .test_nodes import FILES, call, latent

TXT, POOLED = torch.zeros(1, 16, 32), {"pooled_output": torch.zeros(1, 64)}


@pytest.fixture(scope="module")
def wires() -> dict[str, Any]:
    """Everything that FLUX Sampler takes, without a model."""
    return {
        "model": None,
        "positive": [[TXT, POOLED]],
        "noise": call("RectifluxNoise", seed=1),
        "sampler": call("RectifluxSolver", solver="euler"),
        "sigmas": torch.tensor([1.0, 0.5, 0.0]),
        "latent": latent(),
        "cfg_scale": 1.0,
    }


@pytest.fixture
def model(embedded: Folders) -> Any:
    return graphs.run(FILES, "model")[0]


@pytest.mark.parametrize(
    ("shape", "got"),
    [
        ((1, 4, 8, 8), "4 channels"),
        ((1, 16, 3, 8, 8), r"\[1, 16, 3, 8, 8\]"),
        ((1, 16, 0, 8), r"\[1, 16, 0, 8\]"),
        ((1, 16), r"\[1, 16\]"),
    ],
)
def test_latents_of_other_models(wires: dict[str, Any], shape: tuple[int, ...], got: str) -> None:
    wrong = {"samples": torch.ones(shape)}
    for node in (
        lambda: call("RectifluxSampler", **{**wires, "latent": wrong}),
        lambda: call("RectifluxSchedule", latent=wrong, steps=4, denoise=1.0, shift="by size", mu=1.15),
        lambda: call("RectifluxVAEDecode", samples=wrong, vae=None),
        lambda: wires["noise"].generate_noise(wrong),
    ):
        with pytest.raises(ValueError, match=f"got .*{got}"):
            node()


@pytest.mark.parametrize(
    ("sigmas", "got"),
    [
        ([14.6], "14.6"),
        ([14.6, 3.0, 0.0], "14.6"),
        ([0.5, -0.1], "-0.1"),
        ([1.0, float("nan"), 0.0], "nan"),
        ([0.0, 0.5, 1.0], "0 before 0.5"),
        ([[1.0, 0.0]], r".* of shape \[1, 2\]"),
    ],
)
def test_sigmas_of_other_models(wires: dict[str, Any], sigmas: list[float], got: str) -> None:
    with pytest.raises(ValueError, match=f"got {got}"):
        call("RectifluxSampler", **{**wires, "sigmas": torch.tensor(sigmas)})


CONDITIONINGS = {
    "a tensor of encoded text, got a NoneType": [[None, POOLED]],
    "is empty": [],
    "combines 2 prompts": [[TXT, POOLED]] * 2,
}
OF_ANOTHER_WIDTH = {
    "width 32, got 7": [[TXT[..., :7], POOLED]],
    "width 64, got 9": [[TXT, {"pooled_output": torch.zeros(1, 9)}]],
}


@pytest.mark.parametrize("reason", CONDITIONINGS)
def test_conditionings_of_other_models(wires: dict[str, Any], model: Any, reason: str) -> None:
    wires = {**wires, "model": model, "cfg_scale": 2.0}
    for role, other in (("positive", "negative"), ("negative", "positive")):
        entries = {role: CONDITIONINGS[reason], other: [[TXT, POOLED]]}
        with pytest.raises(ValueError, match=reason):
            call("RectifluxSampler", **{**wires, **entries})


@pytest.mark.parametrize("reason", OF_ANOTHER_WIDTH)
def test_conditionings_of_another_width(wires: dict[str, Any], model: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        call("RectifluxSampler", **{**wires, "model": model, "positive": OF_ANOTHER_WIDTH[reason]})


UNSUPPORTED = {
    "control": object(),
    "hooks": object(),
    "attention_mask": torch.ones(1, 16),
    "area": (4, 4, 0, 0),
    "mask": torch.ones(1, 48, 64),
    "strength": 0.5,
    "start_percent": 0.2,
    "end_percent": 0.8,
}
HARMLESS = {
    "strength": 1.0,
    "start_percent": 0.0,
    "end_percent": 1.0,
    "clip_start_percent": 0.0,
    "area": None,
    "set_area_to_bounds": False,
    "reference_latents_method": "offset",
    "uuid": "1234",
}
"""Keys that ComfyUI's nodes leave behind, without effect."""


@pytest.mark.parametrize("key", UNSUPPORTED)
@pytest.mark.parametrize("role", ["positive", "negative"])
def test_conditioning_entries_that_are_not_supported_are_named(
    wires: dict[str, Any], model: Any, role: str, key: str
) -> None:
    entries = {"negative": [[TXT, POOLED]], role: [[TXT, {**POOLED, key: UNSUPPORTED[key]}]]}
    with pytest.raises(ValueError, match=f"{role} conditioning .*'{key}'.* remove the node"):
        call("RectifluxSampler", **{**wires, **entries, "model": model, "cfg_scale": 2.0})


def test_conditioning_entries_without_effect_are_accepted(wires: dict[str, Any], model: Any) -> None:
    plain = call("RectifluxSampler", **{**wires, "model": model})
    same = call("RectifluxSampler", **{**wires, "model": model, "positive": [[TXT, {**POOLED, **HARMLESS}]]})
    assert torch.equal(plain["samples"], same["samples"])


def test_wires_of_the_wrong_kind(wires: dict[str, Any], model: Any) -> None:
    """Each is named with the node that makes it."""
    image = torch.zeros(1, 16, 16, 3)
    prompt = {"prompt": "x", "guidance": 3.5}
    lora = {"strength_model": 1.0, "strength_clip": 1.0, "blocks": "", "lora_name": "tiny-lora.safetensors"}
    for wire, node, run in (
        ("MODEL", "Load FLUX Model", lambda: call("RectifluxSampler", **wires)),
        ("MODEL", "Load FLUX Model", lambda: call("RectifluxCompile", model="x")),
        ("MODEL", "Load FLUX Model", lambda: call("RectifluxLora", model="x", **lora)),
        ("MODEL", "Load FLUX Model", lambda: call("RectifluxTextEncode", clip="x", **prompt, model="x")),
        (
            "MODEL",
            "Load FLUX Model",
            lambda: call("RectifluxStepCache", model="x", method="forecast", threshold=0.1),
        ),
        (
            "SAMPLER",
            "ODE Solver",
            lambda: call("RectifluxSampler", **{**wires, "model": model, "sampler": "euler"}),
        ),
        ("VAE", "Load FLUX VAE", lambda: call("RectifluxVAEDecode", samples=latent(), vae=model)),
        ("VAE", "Load FLUX VAE", lambda: call("RectifluxVAEEncode", image=image, vae=model)),
        ("CLIP", "Load FLUX Text Encoders", lambda: call("RectifluxTextEncode", clip=model, **prompt)),
        ("CLIP", "Load FLUX Text Encoders", lambda: call("RectifluxLora", model=model, clip="x", **lora)),
    ):
        with pytest.raises(TypeError, match=f"the {wire} must come from {node}"):
            run()


@pytest.mark.parametrize(
    ("got", "run"),
    [
        ("100x64", lambda: latent(100, 64)),
        ("100x70", lambda: call("RectifluxVAEEncode", image=torch.zeros(1, 70, 100, 3), vae=None)),
        (
            r".*\[1, 64, 64, 1\]",
            lambda: call("RectifluxVAEEncode", image=torch.zeros(1, 64, 64, 1), vae=None),
        ),
        (
            "0",
            lambda: call(
                "RectifluxSchedule", latent=latent(), steps=0, denoise=1.0, shift="by size", mu=1.15
            ),
        ),
        ("'ddim'", lambda: call("RectifluxSolver", solver="ddim")),
        ("0.0", lambda: call("RectifluxAdaptiveSolver", rtol=0.0, atol=0.1, max_evaluations=100)),
        ("3", lambda: call("RectifluxAdaptiveSolver", rtol=0.1, atol=0.1, max_evaluations=3)),
        ("2.0", lambda: call("RectifluxStochasticSolver", eta=2.0)),
    ],
)
def test_widgets_out_of_bounds(got: str, run: Any) -> None:
    """The editor keeps to the bounds, a script may not."""
    with pytest.raises(ValueError, match=f"got {got}"):
        run()


def test_an_adaptive_solver_that_runs_out_of_model_calls(embedded: Folders) -> None:
    prompt = graphs.text_to_image(FILES, steps=2)
    settings = {"rtol": 0.00001, "atol": 0.00001, "max_evaluations": 20}
    prompt["solver"] = graphs.node("RectifluxAdaptiveSolver", **settings)
    with pytest.raises(ValueError, match="20 evaluations .* raise rtol and atol"):
        graphs.run(prompt, "sample")


def test_files_that_do_not_exist_or_lie_outside(embedded: Folders) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors in models/vae"):
        call("RectifluxVAELoader", vae_name="gone.safetensors")
    for name in ("../diffusion_models/tiny.safetensors", "/etc/passwd", ""):
        with pytest.raises(ValueError, match="must stay in its folder"):
            current_host().model_path("vae", name)


def test_files_of_another_kind(embedded: Folders, tiny_models: Any) -> None:
    (tiny_models / "vae" / "wrong.safetensors").write_bytes(
        (tiny_models / "text_encoders" / "tiny-t5.safetensors").read_bytes()
    )
    with pytest.raises(ValueError, match="wrong.safetensors is a T5 text encoder"):
        call("RectifluxVAELoader", vae_name="wrong.safetensors")
