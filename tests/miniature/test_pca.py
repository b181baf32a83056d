"""The PCA encoder is exactly a linear code of patches, and nearly the best one."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from einops import rearrange
from rectiflux.flux_core.model.autoencoder import AutoEncoder, AutoEncoderSpec, to_model_space
from rectiflux.miniature.autoencoder import draw_batch
from rectiflux.miniature.pca import encode_linear, linear_code, principal, set_pca_encoder


@pytest.fixture(scope="module")
def model(new_autoencoder: Callable[[], AutoEncoder]) -> AutoEncoder:
    return new_autoencoder()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return draw_batch(6, random.Random(77))


@torch.no_grad()
def test_the_encoder_is_its_linear_code(model: AutoEncoder, images: torch.Tensor) -> None:
    """Also on noise, far from the images that the code was computed from."""
    code = linear_code(model)
    for batch in (images, torch.rand_like(images[:2]) * 2 - 1):
        exact = model.encode(batch)
        assert (encode_linear(batch, code) - exact).abs().max() < 5e-3 * exact.std()


@torch.no_grad()
def test_latents_suit_the_transformer(model: AutoEncoder) -> None:
    """Mean 0 and variance 1 in model space over the miniature's images, as FLUX.1's over photographs.

    The first channel is mostly brightness, whose mean over 900 images is known to 0.08.
    """
    latents = to_model_space(encode_linear(draw_batch(900, random.Random(5)), linear_code(model)))
    assert latents.square().mean().item() == pytest.approx(1.0, abs=0.1)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.25


@torch.no_grad()
def test_the_code_keeps_what_principal_components_can(model: AutoEncoder, images: torch.Tensor) -> None:
    """The error of the best linear reconstruction from 16 values, within 15 % of the optimum."""
    patches = rearrange(images, "b c (h y) (w x) -> b (c y x) h w", y=8, x=8)
    directions, _, mean = principal(patches, 16)
    rows = rearrange(patches, "b c h w -> (b h w) c").double() - mean
    best = (rows - rows @ directions.T @ directions).square().mean()
    latents = rearrange(model.encode(images), "b z h w -> (b h w) z").double()
    known = torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1)
    left = (rows - known @ torch.linalg.lstsq(known, rows).solution).square().mean()
    assert best <= left * (1 + 1e-9)
    assert left < 1.15 * best + 1e-4


@pytest.mark.parametrize(
    "spec",
    [
        AutoEncoderSpec(ch=16, ch_mult=(1, 1, 4), num_res_blocks=1),
        AutoEncoderSpec(ch=16, ch_mult=(1, 1, 4, 8), num_res_blocks=2),
        AutoEncoderSpec(ch=8, ch_mult=(1, 1, 4, 8), num_res_blocks=1),
    ],
    ids=["3 levels", "2 blocks", "narrow"],
)
def test_sizes_that_cannot_hold_the_code_are_refused(spec: AutoEncoderSpec) -> None:
    with pytest.raises(ValueError, match="the linear encoder needs 4 levels of 1 block"):
        set_pca_encoder(AutoEncoder(spec), torch.zeros(1, 3, 16, 16))
