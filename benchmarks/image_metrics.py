"""PSNR and SSIM of images."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(image: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of an image in 0..1; infinite for equal images."""
    error = float((image.double() - reference.double()).square().mean())
    return -10 * math.log10(error) if error else math.inf


def ssim(image: Tensor, reference: Tensor) -> float:
    """SSIM of images [3, H, W] in 0..1, window 11 with sigma 1.5 (Wang et al. 2004, section III.B)."""
    offsets = torch.arange(11.0) - 5
    weight = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = (weight[:, None] * weight / weight.sum() ** 2)[None, None]

    def smooth(x: Tensor) -> Tensor:
        return F.conv2d(x[:, None], window)

    a, b = image.float(), reference.float()
    mean_a, mean_b = smooth(a), smooth(b)
    variance_a, variance_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    covariance = smooth(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return float((luminance * (2 * covariance + c2) / (variance_a + variance_b + c2)).mean())
