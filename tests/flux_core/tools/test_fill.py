"""Masks, borders and compositing: what is not filled stays as it was, bit by bit."""

from __future__ import annotations

import pytest
import torch
from rectiflux.flux_core.model.spec import Conditioning
from rectiflux.flux_core.tools.fill import (
    as_mask,
    composite,
    feathered,
    mask_channels,
    masked_image,
    outpaint,
    with_masked_latent,
)


def test_mask_channels_hold_the_pixels_of_each_square_row_by_row() -> None:
    mask = torch.arange(16.0 * 24).reshape(1, 1, 16, 24)
    channels = mask_channels(mask)
    assert channels.shape == (1, 64, 2, 3)
    for i, j, row, column in ((0, 0, 0, 0), (3, 5, 1, 2), (7, 7, 0, 1)):
        assert channels[0, 8 * i + j, row, column] == mask[0, 0, 8 * row + i, 8 * column + j]


def test_a_soft_mask_stays_soft_in_the_channels_and_is_rounded_in_the_image() -> None:
    image = torch.full((1, 3, 16, 16), 0.8)
    mask = torch.full((1, 1, 16, 16), 0.25)
    mask[..., 8:] = 0.75
    assert torch.equal(masked_image(image, mask)[..., :8], image[..., :8])
    assert not masked_image(image, mask)[..., 8:].any()
    prompt = Conditioning(torch.zeros(1, 2, 4), None)
    extra = with_masked_latent(prompt, torch.zeros(1, 16, 2, 2), mask).extra
    assert extra is not None and extra.shape == (1, 80, 2, 2)
    assert extra[0, 16:].unique().tolist() == [0.25, 0.75]


def test_untouched_pixels_of_a_composite_are_the_originals() -> None:
    generator = torch.Generator().manual_seed(0)
    original, generated = (torch.rand(1, 3, 64, 64, generator=generator) for _ in range(2))
    mask = torch.zeros(1, 64, 64)
    mask[:, 24:40, 20:44] = 1.0
    for feather in (0, 1, 6, 7):
        result = composite(original, generated, mask, feather)
        far = torch.ones(64, 64, dtype=torch.bool)
        far[24 - feather : 40 + feather, 20 - feather : 44 + feather] = False
        assert torch.equal(result[..., far], original[..., far])
        inside = mask[0].bool()
        assert torch.allclose(result[..., inside], generated[..., inside])
    soft = feathered(as_mask(mask, 64, 64), 6)[0, 0, 32, :20]
    assert (soft.diff() >= 0).all() and 0 < soft[17] < 1


def test_composites_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="16x8 and 8x8"):
        composite(torch.zeros(1, 3, 8, 16), torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 16))
    with pytest.raises(ValueError, match="got 2, 3 and 1"):
        composite(torch.zeros(2, 3, 8, 8), torch.zeros(3, 3, 8, 8), torch.zeros(1, 8, 8))
    prompt = Conditioning(torch.zeros(1, 2, 4), None)
    with pytest.raises(ValueError, match="for all 2, got 3"):
        with_masked_latent(prompt, torch.zeros(2, 16, 1, 1), torch.zeros(3, 1, 8, 8))


def test_outpainting_adds_gray_borders_and_masks_them() -> None:
    image = torch.rand(1, 3, 8, 16)
    larger, mask = outpaint(image, left=8, top=0, right=16, bottom=24)
    assert larger.shape == (1, 3, 32, 40) and mask.shape == (1, 1, 32, 40)
    assert torch.equal(larger[..., :8, 8:24], image)
    assert not larger[mask.expand(-1, 3, -1, -1) == 1].any() and mask.sum() == 32 * 40 - 8 * 16
    with pytest.raises(ValueError, match="0 or more"):
        outpaint(image, -8, 0, 0, 0)
