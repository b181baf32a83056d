"""Canny and Depth models: a control image beside the latent, as 16 more channels.

Source: black-forest-labs/flux, src/flux/sampling.py: prepare_control. What makes a control image of a photo:
`canny`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ..model.spec import Conditioning


def with_control_latent(conditioning: Conditioning, latent: Tensor) -> Conditioning:
    """The conditioning with a control image, as its latent [B or 1, 16, h, w] in model space.

    Example: `with_control_latent(prompt, to_model_space(autoencoder.encode(canny(image))))`.
    """
    return replace(conditioning, extra=latent)


def canny(image: Tensor, low: float = 0.1, high: float = 0.3) -> Tensor:
    """Edges of an image [B, 3, H, W] in -1..1: white on black, of the same shape and range.

    Pixels whose gradient is above `high` are edges, and those above `low` that are connected to them; the
    gradient is that of a Sobel filter on an image in 0..1 after a slight blur. 0.1 and 0.3 suit drawings and
    photos; 0.2 and 0.8 are about the 50 and 200 of 255 that FLUX.1 Canny's own code uses. By kornia's filter,
    with connected components from scipy, which give kornia's own result in a tenth of its time.

    Raises ImportError, in one sentence, where kornia is not installed, and ValueError unless
    0 < low <= high.

    Example: `canny(image, low=0.2, high=0.8)`.
    """
    if not 0.0 < low <= high:
        raise ValueError(f"Canny's thresholds must be 0 < low <= high, got {low:g} and {high:g}")
    try:
        from kornia.filters import canny as detect
    except ImportError as error:
        raise ImportError("Canny edges need the package kornia; install it: pip install kornia") from error
    found: tuple[Tensor, Tensor] = detect((image.float() + 1) / 2, low, high, hysteresis=False)
    edges = np.stack([_connected(levels) for levels in found[1][:, 0].cpu().numpy()])
    return torch.from_numpy(edges).to(image)[:, None].expand(-1, 3, -1, -1) * 2 - 1


def _connected(levels: np.ndarray) -> np.ndarray:
    """Whether a pixel [H, W] is strong (1), or weak (0.5) and connected to a strong one."""
    labels = np.empty(levels.shape, dtype=np.int32)
    ndimage.label(levels > 0, structure=np.ones((3, 3)), output=labels)
    return np.isin(labels, np.unique(labels[levels == 1.0]))
