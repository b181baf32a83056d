"""LATENT, SIGMAS, seeds and sizes at the edge of what nodes produce do what ComfyUI's own FLUX does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rectiflux.host import files
from rectiflux.host.files import Folders
from rectiflux.host.registry import Registry
from rectiflux.host.render import main as render
from rectiflux.host.validation import InvalidPrompt, validate
from rectiflux.nodes import NODE_CLASS_MAPPINGS
from torch import Tensor

from . import graphs
from .test_nodes import FILES, call, latent

EMPTY = {
    "4 channels": {"samples": torch.zeros(2, 4, 6, 8)},
    "4 channels, its ratio": {"samples": torch.zeros(2, 4, 6, 8), "downscale_ratio_spacial": 8},
    "128 channels of a sixteenth": {"samples": torch.zeros(2, 128, 3, 4), "downscale_ratio_spacial": 16},
    "half precision": {"samples": torch.zeros(2, 16, 6, 8).half()},
}


def sampled(start: dict[str, Any], target: str = "sample", **settings: Any) -> Any:
    """The first output of a node of text to image that starts from a LATENT."""
    prompt = graphs.text_to_image(FILES, **settings)
    return graphs.run(prompt, target, {"latent": (start,)})[0]


@pytest.mark.parametrize("kind", EMPTY)
@pytest.mark.parametrize("mask", [{}, {"noise_mask": torch.ones(1, 48, 64).triu()}], ids=["", "masked"])
def test_an_empty_latent_of_another_model_is_an_empty_one(
    embedded: Folders, kind: str, mask: dict[str, Tensor]
) -> None:
    expected = sampled({**latent(batch_size=2), **mask})
    found = sampled({**EMPTY[kind], **mask})
    assert torch.equal(found["samples"], expected["samples"]) and "downscale_ratio_spacial" not in found
    noise = call("RectifluxNoise", seed=3)
    assert torch.equal(noise.generate_noise(EMPTY[kind]), noise.generate_noise(latent(batch_size=2)))


ODD = {"samples": torch.ones(2, 16, 15, 17)}


def test_the_sizes_beside_an_odd_latent_are_named() -> None:
    """136 x 120 pixels."""
    wires = dict.fromkeys(("model", "positive", "noise", "sampler"))
    for node in (
        lambda: call("RectifluxSampler", **wires, sigmas=torch.tensor([1.0, 0.0]), latent=ODD, cfg_scale=1.0),
        lambda: call("RectifluxSchedule", latent=ODD, steps=4, denoise=1.0, shift="by size", mu=1.15),
    ):
        with pytest.raises(ValueError, match="136x120 pixels; 128x112 and 144x128 are near"):
            node()
    with pytest.raises(ValueError, match="got 1920x1080; 1920x1072 and 1920x1088 are near"):
        call("RectifluxVAEEncode", image=torch.zeros(1, 1080, 1920, 3), vae=None)


def test_odd_latents_are_drawn_and_decoded(embedded: Folders) -> None:
    """As ComfyUI's samplers and VAEDecode need them."""
    assert call("RectifluxNoise", seed=3).generate_noise(ODD).shape == (2, 16, 15, 17)
    vae = graphs.run(FILES, "vae")[0]
    assert call("RectifluxVAEDecode", samples=ODD, vae=vae).shape == (2, 120, 136, 3)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"width": 1080}, "got 1080x128; 1072x128 and 1088x128 are near"),
        ({"height": 8}, "got 128x8; 128x16 is near"),
        ({"width": 8208}, "at most 8192, got 8208x128"),
        ({"seed": 2**64}, "2^64 - 1, got 18446744073709551616; choose one up to 9007199254740991"),
        ({"seed": -1}, "got -1"),
        ({"seed": 1e20}, "got 100000000000000000000; choose one up to 9007199254740991"),
        ({"steps": "4", "seed": "7.5"}, "seed must be an integer, got '7.5'"),
    ],
)
def test_sizes_and_seeds_out_of_range_are_refused_before_anything_runs(
    embedded: Folders, inputs: dict[str, Any], message: str
) -> None:
    prompt = graphs.text_to_image(FILES, width=128, height=128)
    for node in ("latent", "noise", "schedule"):
        prompt[node]["inputs"] |= {k: v for k, v in inputs.items() if k in prompt[node]["inputs"]}
    prompt["save"] = graphs.node("SaveImage", images=["decode", 0], filename_prefix="x")
    with pytest.raises(InvalidPrompt) as refused:
        validate(prompt, Registry.of_pack(embedded))
    (errors,) = refused.value.node_errors.values()
    assert message in errors["errors"][0]["details"]


def test_wired_sizes_and_seeds_are_checked_when_they_arrive() -> None:
    assert NODE_CLASS_MAPPINGS["RectifluxEmptyLatent"].VALIDATE_INPUTS(width=None, height=1080) is True
    assert NODE_CLASS_MAPPINGS["RectifluxNoise"].VALIDATE_INPUTS(seed=None) is True
    with pytest.raises(ValueError, match="at most 8192, got 16384x64"):
        latent(16384, 64)
    with pytest.raises(ValueError, match="got -1"):
        call("RectifluxNoise", seed=-1)


def test_the_seed_widget_ends_where_a_browser_rounds(embedded: Folders) -> None:
    kind, options = NODE_CLASS_MAPPINGS["RectifluxNoise"].INPUT_TYPES()["required"]["seed"]
    assert kind == "INT" and options["max"] == 9007199254740991


@pytest.mark.parametrize("seed", [2**53 - 1, 2**53 + 1, 6687881544318117707, 2**64 - 1])
def test_every_digit_of_a_seed_is_kept(
    embedded: Folders, tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Given as a number or as text, and in the rendered PNG."""
    monkeypatch.setattr(files, "PACK", tmp_path / "pack")  # data/ is created there
    prompt = graphs.text_to_image(FILES, steps=1, cfg_scale=1.0, width=16, height=16)
    prompt["save"] = graphs.node("SaveImage", images=["decode", 0], filename_prefix="seed")
    checked = [
        validate({**prompt, "noise": graphs.node("RectifluxNoise", seed=value)}, Registry.of_pack(embedded))
        for value in (seed, str(seed))
    ]
    assert [entry.prompt["noise"]["inputs"]["seed"] for entry in checked] == [seed, seed]
    (tmp_path / "prompt.json").write_text(json.dumps(prompt))
    arguments = [
        tmp_path / "prompt.json",
        "--set",
        f"seed={seed}",
        "--out",
        tmp_path,
        "--models",
        tiny_models,
    ]
    assert render([str(argument) for argument in arguments]) == 0
    (path,) = tmp_path.glob("*.png")
    with Image.open(path) as image:
        assert json.loads(image.text["prompt"])["noise"]["inputs"]["seed"] == seed


NOTHING_LEFT = {"last": [0.0], "beyond the last": [], "first": [1.0], "twice the same": [0.5, 0.5]}


@pytest.mark.parametrize("split", NOTHING_LEFT)
def test_a_schedule_with_nothing_left_returns_the_latent(embedded: Folders, split: str) -> None:
    start = {"samples": torch.randn(1, 16, 6, 8), "noise_mask": torch.ones(1, 48, 64).tril()}
    prompt = graphs.text_to_image(FILES)
    done: dict[str, Any] = {"latent": (start,), "schedule": (torch.tensor(NOTHING_LEFT[split]),)}
    found, report = graphs.run(prompt, "sample", done)
    assert torch.equal(found["samples"], start["samples"]) and found["noise_mask"] is start["noise_mask"]
    assert "steps: 0" in report and "unchanged" in report


def test_steps_of_length_zero_are_left_out(embedded: Folders) -> None:
    """Such as those of our own schedule at its limits, where float32 cannot tell two sigmas apart."""
    expected = sampled(latent(), steps=2, shift="none")["samples"]
    done: dict[str, Any] = {"schedule": (torch.tensor([1.0, 1.0, 0.5, 0.5, 0.0, 0.0]),)}
    for solver in ("euler", "ab3"):
        prompt = graphs.text_to_image(FILES, solver=solver)
        found = graphs.run(prompt, "sample", {**done})[0]["samples"]
        assert torch.isfinite(found).all() and (solver != "euler" or torch.equal(found, expected))
    settings = {"steps": 1000, "denoise": 1.0, "shift": "fixed", "mu": 10.0}
    many = call("RectifluxSchedule", latent=latent(), **settings)
    assert len(many.unique()) < 1001
    wires = {**dict.fromkeys(("positive", "noise", "sampler")), "latent": latent(), "cfg_scale": 1.0}
    with pytest.raises(TypeError, match="MODEL must come from"):  # the schedule itself is accepted
        call("RectifluxSampler", model=None, sigmas=many, **wires)


def test_the_smallest_denoise_stays_close_to_the_start(embedded: Folders) -> None:
    start = {"samples": torch.randn(1, 16, 6, 8)}
    found = sampled(start, denoise=0.01)["samples"]
    assert 0 < float((found - start["samples"]).abs().max()) < 0.5


@pytest.mark.parametrize("count", [1, 3, 5])
def test_masks_are_repeated_and_cut_to_the_batch(embedded: Folders, count: int) -> None:
    """As ComfyUI does: masks of 1, 3 and 5 images of other sizes for 3 latents."""
    start = torch.randn(3, 16, 6, 8)
    mask = torch.zeros(count, 24, 24)
    mask[0] = 1.0
    found = sampled({"samples": start, "noise_mask": mask})["samples"]
    changed = [bool((a - b).abs().max() > 1e-3) for a, b in zip(found, start, strict=True)]
    assert changed == [True, count == 1, count == 1]


def test_noise_of_another_shape_is_refused(embedded: Folders) -> None:
    with pytest.raises(ValueError, match=r"shape \[2, 16, 6, 8\], got \[1, 16, 6, 8\]"):
        sampled({**latent(batch_size=2), "batch_index": [4]})


def test_a_conditioning_without_a_pooled_vector_counts_as_zeros(embedded: Folders) -> None:
    """As ComfyUI's FLUX takes it; in the positive, the negative, and both."""
    done: dict[str, Any] = {}
    prompt = graphs.text_to_image(FILES)
    positive, negative = (graphs.run(prompt, name, done)[0] for name in ("positive", "negative"))

    def with_pooled(entries: Any, pooled: Tensor | None) -> Any:
        return [[txt, {**extra, "pooled_output": pooled}] for txt, extra in entries]

    zeros = torch.zeros_like(positive[0][1]["pooled_output"])
    for first, second in ((None, zeros), (zeros, None), (None, None)):
        done |= {"positive": (with_pooled(positive, zeros),), "negative": (with_pooled(negative, zeros),)}
        expected = graphs.run(prompt, "sample", {**done})[0]["samples"]
        done |= {"positive": (with_pooled(positive, first),), "negative": (with_pooled(negative, second),)}
        found = graphs.run(prompt, "sample", {**done})[0]["samples"]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)  # one pass or two
