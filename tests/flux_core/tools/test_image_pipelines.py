"""Kontext, Fill, Canny and Depth against diffusers' pipelines: same weights, latents and images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from rectiflux.benchmarks.reference.models import (
    autoencoder,
    diffusers_autoencoder,
    diffusers_pipeline,
    diffusers_transformer,
    flux_transformer,
    relative_error,
    text,
)
from rectiflux.flux_core.model.autoencoder import to_model_space
from rectiflux.flux_core.model.spec import Conditioning
from rectiflux.flux_core.model.tokens import pack
from rectiflux.flux_core.model.transformer import FluxTransformer
from rectiflux.flux_core.pipeline import Guidance, SampleRequest, draw_noise, sample
from rectiflux.flux_core.sampling.schedule import make_sigmas
from rectiflux.flux_core.sampling.solver import solver_named
from rectiflux.flux_core.tools.control import with_control_latent
from rectiflux.flux_core.tools.fill import masked_image, with_masked_latent
from rectiflux.flux_core.tools.kontext import with_references
from torch import Tensor

WIDTH, HEIGHT, STEPS = 48, 32, 3
H, W = HEIGHT // 8, WIDTH // 8
VAE = autoencoder()


@pytest.fixture(autouse=True)
def mean_of_the_posterior(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """BFL's code and ComfyUI encode with the mean, diffusers' Fill and Control pipelines draw a sample."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    with torch.no_grad():
        yield


def image(width: int = WIDTH, height: int = HEIGHT, seed: int = 3, batch: int = 1) -> Tensor:
    """Values in -1..1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, height, width, generator=generator) * 2 - 1


def ours(model: FluxTransformer, conditioning: Conditioning, noise: Tensor, **settings: Any) -> Tensor:
    sigmas = make_sigmas(STEPS, noise.shape[-2] * noise.shape[-1] // 4)
    request = SampleRequest(
        conditioning, noise, torch.zeros_like(noise), sigmas, solver_named("euler"), **settings
    )
    return pack(sample(model, request))


def theirs(model: FluxTransformer, kind: str, noise: Tensor, prompt: Conditioning, **inputs: Any) -> Tensor:
    """Packed latents of a pipeline with our weights."""
    pipeline = diffusers_pipeline(diffusers_transformer(model), diffusers_autoencoder(VAE), kind=kind)
    rows = len(noise)
    return pipeline(
        prompt_embeds=prompt.txt.expand(rows, -1, -1),
        pooled_prompt_embeds=prompt.pooled.expand(rows, -1),
        guidance_scale=prompt.guidance,
        num_inference_steps=STEPS,
        latents=pack(noise),
        output_type="latent",
        return_dict=False,
        height=8 * noise.shape[-2],
        width=8 * noise.shape[-1],
        **inputs,
    )[0]


def encoded(picture: Tensor) -> Tensor:
    return to_model_space(VAE.encode(picture))


@pytest.mark.parametrize("batch", [1, 2])
def test_fill(batch: int) -> None:
    model, noise, prompt = (
        flux_transformer(in_channels=384),
        draw_noise(1, batch, H, W),
        text(1, guidance=30.0),
    )
    picture = image()
    mask = torch.zeros(1, 1, HEIGHT, WIDTH)
    mask[..., 5:21, 11:40] = 1.0
    conditioning = with_masked_latent(prompt, encoded(masked_image(picture, mask)), mask)
    expected = theirs(model, "FluxFillPipeline", noise, prompt, image=picture / 2 + 0.5, mask_image=mask)
    assert relative_error(ours(model, conditioning, noise), expected) < 1e-5
    everything = with_masked_latent(prompt, encoded(masked_image(picture, torch.ones_like(mask))))
    ones = torch.ones_like(mask)
    expected = theirs(model, "FluxFillPipeline", noise, prompt, image=picture / 2 + 0.5, mask_image=ones)
    assert relative_error(ours(model, everything, noise), expected) < 1e-5


def test_canny_and_depth() -> None:
    model, noise, prompt = flux_transformer(in_channels=128), draw_noise(1, 2, H, W), text(1, guidance=10.0)
    conditioning = with_control_latent(prompt, encoded(image()))
    # a tensor is taken as it is, an image would be mapped to -1..1
    expected = theirs(model, "FluxControlPipeline", noise, prompt, control_image=image())
    assert relative_error(ours(model, conditioning, noise), expected) < 1e-5


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
def test_kontext(cfg_scale: float) -> None:
    """A reference of another size than the generated image, under both kinds of guidance."""
    model, noise, prompt = flux_transformer(), draw_noise(1, 1, H, W), text(1)
    negative, picture = text(2), image(64, 48)
    with_image, without = (with_references(one, [encoded(picture)], H, W) for one in (prompt, negative))
    expected = theirs(
        model,
        "FluxKontextPipeline",
        noise,
        prompt,
        image=picture / 2 + 0.5,
        _auto_resize=False,
        max_area=WIDTH * HEIGHT,
        true_cfg_scale=cfg_scale,
        negative_prompt_embeds=negative.txt,
        negative_pooled_prompt_embeds=negative.pooled,
    )
    found = ours(model, with_image, noise, guidance=Guidance(without, cfg_scale))
    assert relative_error(found, expected) < 1e-5


def test_images_that_a_model_cannot_take_are_refused() -> None:
    noise, prompt = draw_noise(1, 1, H, W), text(1)
    control = with_control_latent(prompt, encoded(image()))
    for model, conditioning, sentence in (
        (flux_transformer(), control, "64 input channels, got 128; .*choose a Canny, Depth or Fill model"),
        (flux_transformer(in_channels=128), prompt, "128 input channels, got 64; .*need a control image"),
        (flux_transformer(in_channels=384), control, "384 input channels, got 128; .*an image and a mask"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ours(model, conditioning, noise)
    with pytest.raises(ValueError, match=r"\[B, 16, h, w\], got \[1, 4, 4, 6\]"):
        with_references(prompt, [torch.zeros(1, 4, H, W)], H, W)
    with pytest.raises(ValueError, match="one strength, got 2 for 1"):
        with_references(prompt, [torch.zeros(1, 16, H, W)], H, W, strengths=[1.0, 1.0])
    with pytest.raises(ValueError, match="1 or one for all 2, got 3"):
        ours(flux_transformer(in_channels=128), replace(control, extra=torch.zeros(3, 16, H, W)),
             draw_noise(1, 2, H, W))  # fmt: skip
