"""The image nodes in the embedded host: what they put into a CONDITIONING, and what is sampled from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rectiflux.flux_core.model.autoencoder import to_model_space, to_vae_space
from rectiflux.flux_core.model.spec import Conditioning
from rectiflux.flux_core.pipeline import SampleRequest, sample
from rectiflux.flux_core.sampling.solver import solver_named
from rectiflux.flux_core.tools.control import with_control_latent
from rectiflux.flux_core.tools.fill import masked_image, with_masked_latent
from rectiflux.flux_core.tools.kontext import with_references
from rectiflux.host.files import Folders
from rectiflux.nodes import NODE_CLASS_MAPPINGS
from rectiflux.nodes.conditioning_wires import with_reference
from torch import Tensor

from .tiny import NAMES, POOLED_WIDTH, SPEC, TXT_LENGTH, TXT_WIDTH, write_transformer

WIDTH, HEIGHT = 64, 48


def call(class_type: str, **inputs: Any) -> Any:
    kind = NODE_CLASS_MAPPINGS[class_type]
    return getattr(kind(), kind.FUNCTION)(**inputs)


@pytest.fixture
def models(embedded: Folders, tiny_models: Path) -> dict[int, Any]:
    """MODELs by their input channels."""
    found = {}
    for channels in (64, 128, 384):
        name = f"tiny-{channels}.safetensors"
        write_transformer(tiny_models / "diffusion_models" / name, replace(SPEC, in_channels=channels))
        found[channels] = call("RectifluxModelLoader", model_name=name, weight_dtype="auto")[0]
    return found


@pytest.fixture
def vae(embedded: Folders) -> Any:
    return call("RectifluxVAELoader", vae_name=NAMES["vae"])[0]


def prompt(seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    txt = torch.randn(1, TXT_LENGTH, TXT_WIDTH, generator=generator)
    return [[txt, {"pooled_output": torch.randn(1, POOLED_WIDTH, generator=generator), "guidance": 3.5}]]


def picture(width: int = WIDTH, height: int = HEIGHT, seed: int = 2) -> Tensor:
    return torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(seed))


def core(entries: Any) -> Conditioning:
    txt, extra = entries[0]
    return Conditioning(txt, extra["pooled_output"], extra["guidance"])


def sampled(model: Any, positive: Any, latent: Any) -> Tensor:
    sigmas = call("RectifluxSchedule", latent=latent, steps=2, denoise=1.0, shift="by size", mu=1.15)[0]
    return call(
        "RectifluxSampler",
        model=model,
        positive=positive,
        noise=call("RectifluxNoise", seed=5)[0],
        sampler=call("RectifluxSolver", solver="euler")[0],
        sigmas=sigmas,
        latent=latent,
        cfg_scale=1.0,
    )[0]["samples"]


def expected(model: Any, conditioning: Conditioning, latent: Any) -> Tensor:
    """flux_core's own result of the same run."""
    sigmas = call("RectifluxSchedule", latent=latent, steps=2, denoise=1.0, shift="by size", mu=1.15)[0]
    noise = call("RectifluxNoise", seed=5)[0].generate_noise(latent)
    start = to_model_space(latent["samples"]) if latent["samples"].any() else latent["samples"]
    mask = latent.get("noise_mask")
    request = SampleRequest(
        conditioning, noise, start, sigmas, solver_named("euler"), noise_mask=mask, seed=5
    )
    return to_vae_space(sample(model.network, request))


def encoded(vae: Any, image: Tensor) -> Tensor:
    return to_model_space(vae.encode(image.movedim(-1, 1) * 2 - 1))


@torch.no_grad()
def test_two_references_of_any_size(models: dict[int, Any], vae: Any) -> None:
    first, second = picture(), picture(32, 80, seed=3)
    entries, latent = call(
        "RectifluxKontextReference",
        conditioning=prompt(),
        vae=vae,
        image=first,
        method="offset",
        strength=1.0,
    )
    assert latent["samples"].shape == (1, 16, HEIGHT // 8, WIDTH // 8)
    chained, _ = call(
        "RectifluxKontextReference",
        conditioning=entries,
        vae=vae,
        image=second,
        method="uxo",
        strength=0.5,
    )
    assert "reference_latents" not in prompt()[0][1] and len(entries[0][1]["reference_latents"]) == 1
    h, w = HEIGHT // 8, WIDTH // 8
    latents = [encoded(vae, first), encoded(vae, second)]
    wanted = with_references(core(prompt()), latents, h, w, "uxo", [1.0, 0.5])
    empty = {"samples": torch.zeros(1, 16, h, w)}
    found = sampled(models[64], chained, empty)
    torch.testing.assert_close(found, expected(models[64], wanted, empty), atol=1e-4, rtol=1e-4)
    assert (found - sampled(models[64], prompt(), empty)).abs().max() > 0.01


@torch.no_grad()
def test_fill_and_putting_the_result_back(models: dict[int, Any], vae: Any) -> None:
    image, mask = picture(), torch.zeros(1, HEIGHT // 2, WIDTH // 2)
    mask[:, 4:16, 8:20] = 1.0
    entries, latent = call("RectifluxFill", conditioning=prompt(), vae=vae, image=image, mask=mask)
    full = torch.nn.functional.interpolate(mask[:, None], size=(HEIGHT, WIDTH), mode="bilinear")
    hole = masked_image(image.movedim(-1, 1) * 2 - 1, full).movedim(1, -1) / 2 + 0.5
    wanted = with_masked_latent(core(prompt()), encoded(vae, hole), full)
    found = sampled(models[384], entries, latent)
    torch.testing.assert_close(found, expected(models[384], wanted, latent), atol=1e-4, rtol=1e-4)
    generated = call("RectifluxVAEDecode", samples={"samples": found}, vae=vae)[0]
    (result,) = call("RectifluxComposite", original=image, generated=generated, mask=mask, feather=3)
    assert torch.equal(result[:, 40:], image[:, 40:])
    assert torch.allclose(result[:, 12:28, 20:36], generated[:, 12:28, 20:36], atol=1e-6)


@torch.no_grad()
def test_a_control_image_of_edges(models: dict[int, Any], vae: Any) -> None:
    (edges,) = call("RectifluxCanny", image=picture(), low=0.1, high=0.3)
    assert edges.shape == (1, HEIGHT, WIDTH, 3) and sorted(edges.unique().tolist()) == [0.0, 1.0]
    entries, latent = call("RectifluxControlImage", conditioning=prompt(), vae=vae, image=edges)
    wanted = with_control_latent(core(prompt()), encoded(vae, edges))
    found = sampled(models[128], entries, latent)
    torch.testing.assert_close(found, expected(models[128], wanted, latent), atol=1e-4, rtol=1e-4)


def test_what_a_model_cannot_take_is_refused_before_it_runs(models: dict[int, Any], vae: Any) -> None:
    entries, latent = call("RectifluxControlImage", conditioning=prompt(), vae=vae, image=picture())
    with pytest.raises(ValueError, match="64 input channels, got 128; .*choose a Canny, Depth or Fill model"):
        sampled(models[64], entries, latent)
    with pytest.raises(ValueError, match="128 input channels, got 64; .*need a control image"):
        sampled(models[128], prompt(), latent)
    with pytest.raises(ValueError, match="384 input channels, got 64; .*an image and a mask"):
        sampled(models[384], prompt(), latent)
    with pytest.raises(ValueError, match="needs a mask .*; connect FLUX Fill"):
        sampled(models[384], entries, latent)
    hole = torch.ones(1, HEIGHT, WIDTH)
    filled, _ = call("RectifluxFill", conditioning=prompt(), vae=vae, image=picture(), mask=hole)
    with pytest.raises(ValueError, match="only Fill models take a mask .*128 input channels"):
        sampled(models[128], filled, latent)
    with pytest.raises(ValueError, match="tokens of 128 values, a reference has 64"):
        sampled(models[128], with_reference(entries, latent["samples"], 1.0, "offset"), latent)
    with pytest.raises(ValueError, match="size 32x32, got 64x48"):
        sampled(models[128], entries, {"samples": torch.zeros(1, 16, 4, 4)})
    with pytest.raises(ValueError, match="multiples of 16 to be encoded, got 60x48"):
        call("RectifluxControlImage", conditioning=prompt(), vae=vae, image=picture(60))


def test_outpainting_gives_an_image_and_a_mask_that_fit_each_other(embedded: Folders) -> None:
    image, mask = call("RectifluxPadForOutpaint", image=picture(), left=16, top=0, right=0, bottom=32)
    assert image.shape == (1, HEIGHT + 32, WIDTH + 16, 3) and mask.shape == (1, HEIGHT + 32, WIDTH + 16)
    assert torch.equal(image[:, :HEIGHT, 16:], picture()) and not mask[:, :HEIGHT, 16:].any()
    assert image[mask == 1].unique().tolist() == [0.5]
