"""PSNR and SSIM of images whose values are known."""

from __future__ import annotations

import math

import pytest
import torch
from rectiflux.benchmarks.image_metrics import psnr, ssim

IMAGE = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0))


def test_psnr() -> None:
    """A difference of a tenth everywhere is 20 dB."""
    assert psnr(IMAGE + 0.1, IMAGE) == pytest.approx(20.0, abs=1e-4)
    assert psnr(IMAGE, IMAGE) == math.inf


def test_ssim() -> None:
    """Constant images a and b have SSIM (2 a b + c) / (a^2 + b^2 + c); inverted texture is below 0."""
    assert ssim(IMAGE, IMAGE) == pytest.approx(1.0, abs=1e-5)
    a, b = torch.full((3, 16, 16), 0.5), torch.full((3, 16, 16), 0.25)
    assert ssim(a, b) == pytest.approx((0.25 + 1e-4) / (0.3125 + 1e-4), abs=1e-4)
    assert ssim(1 - IMAGE, IMAGE) < 0.0
    noise = torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(1))
    assert ssim(IMAGE, IMAGE + 0.01 * noise) > 0.98
