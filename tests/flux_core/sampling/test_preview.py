"""The linear preview: the map that generated the data is recovered, and stored as metadata."""

from __future__ import annotations

import pytest
import torch
from rectiflux.flux_core.sampling import preview


def linear_pairs() -> tuple[torch.Tensor, torch.Tensor, preview.Factors]:
    """Latents, and images that are exactly a linear map of them, each position a flat 8 x 8 patch."""
    generator = torch.Generator().manual_seed(0)
    factors = preview.Factors(torch.randn(16, 3, generator=generator) / 20, torch.tensor([0.1, -0.2, 0.05]))
    latents = torch.randn(4, 16, 6, 5, generator=generator)
    small = torch.einsum("bchw,ck->bkhw", latents, factors.weight) + factors.bias[:, None, None]
    return latents, small.repeat_interleave(8, -1).repeat_interleave(8, -2), factors


def test_fit_recovers_the_map() -> None:
    latents, images, factors = linear_pairs()
    found = preview.fit(latents, images)
    torch.testing.assert_close(found.weight, factors.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.bias, factors.bias, rtol=1e-4, atol=1e-5)


def test_pixels_are_those_of_the_images() -> None:
    latents, images, factors = linear_pairs()
    pixels = preview.to_rgb(latents, factors)
    expected = (images[0, :, ::8, ::8].permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5
    assert (pixels.shape, pixels.dtype) == ((6, 5, 3), torch.uint8)
    assert (pixels.float() - expected).abs().max() <= 0.501


def test_without_factors_it_is_gray() -> None:
    pixels = preview.to_rgb(linear_pairs()[0])
    assert pixels.shape == (6, 5, 3)
    assert torch.equal(pixels[..., 0], pixels[..., 1])
    assert pixels.unique().numel() > 5
    assert preview.to_rgb(torch.zeros(1, 16, 2, 2)).shape == (2, 2, 3)


def test_factors_are_stored_as_metadata() -> None:
    factors = linear_pairs()[2]
    found = preview.from_metadata(preview.to_metadata(factors))
    assert found is not None
    torch.testing.assert_close(found.weight, factors.weight, rtol=0, atol=1e-5)
    assert preview.from_metadata({}) is None


@pytest.mark.parametrize("text", ["", "[1, 2]", "[[1, 2, 3]]", '{"a": 1}', "null"])
def test_broken_metadata_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=preview.KEY):
        preview.from_metadata({preview.KEY: text})
