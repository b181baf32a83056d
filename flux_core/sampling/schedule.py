"""Noise schedule: descending sigmas from the numbers of steps and image tokens.

FLUX.1 spaces its sigmas evenly and then shifts them towards noise, more for larger images. In the logit of
sigma a shift by mu is a translation by mu, so shift(a) after shift(b) is shift(a + b), and shift(-mu) inverts
shift(mu). Shifting twice is a known mistake: only `make_sigmas` shifts, and it shifts once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SHIFTS = ("by size", "none", "fixed")
"""mu from the number of image tokens (FLUX.1 [dev]), no shift ([schnell]), or a given mu."""

FIXED_MU = 1.15
"""mu of 4096 image tokens (1024 x 1024), which ComfyUI uses at every size by default."""


def mu_for_tokens(seq_len: int) -> float:
    """Shift exponent mu for `seq_len` image tokens: the line through (256, 0.5) and (4096, 1.15), unclamped.

    Source: black-forest-labs/flux, src/flux/sampling.py, get_lin_function. Raises ValueError below one token.
    """
    if seq_len < 1:
        raise ValueError(f"a schedule needs at least one image token, got {seq_len}; make the image larger")
    return 0.5 + (seq_len - 256) * (1.15 - 0.5) / (4096 - 256)


def shift_sigmas(sigmas: Tensor, mu: float) -> Tensor:
    """sigmas e^mu / (e^mu + 1/sigma - 1), of the shape and dtype of `sigmas`; 0 and 1 are unchanged.

    Source: Esser et al. 2024 (arXiv:2403.03206), eq. 23 with shift = e^mu; BFL sampling.py, time_shift.
    Written without the division by sigma, so that sigma 0 needs no special case. Raises ValueError unless
    -50 <= mu <= 50.
    """
    if not -50.0 <= mu <= 50.0:
        raise ValueError(f"the shift exponent mu must lie between -50 and 50, got {mu}; 1.15 is usual")
    return sigmas / (sigmas + math.exp(-mu) * (1 - sigmas))


def make_sigmas(
    steps: int, seq_len: int, *, shift: str = "by size", mu: float = FIXED_MU, denoise: float = 1.0
) -> Tensor:
    """Descending sigmas [steps + 1], float32 on the CPU, first 1.0 (below with denoise < 1), last 0.0.

    `shift` is one of SHIFTS; `mu` is used only with "fixed". `denoise` has ComfyUI's meaning: the last
    `steps` steps of a schedule of int(steps / denoise) steps, so that `steps` are run. (diffusers instead
    runs the last int(steps * strength) of `steps` steps.) Raises ValueError for fewer than one step, denoise
    outside (0, 1], an unknown shift, and what the shift raises. Example:

        sigmas = make_sigmas(28, seq_len=(1024 // 16) ** 2)
    """
    if steps < 1:
        raise ValueError(f"a schedule needs at least 1 step, got {steps}; 20 to 28 is usual for FLUX.1 [dev]")
    if not 0.0 < denoise <= 1.0:
        raise ValueError(f"denoise must be above 0 and at most 1, got {denoise}; 1 starts from pure noise")
    if shift not in SHIFTS:
        raise ValueError(f"shift must be one of {', '.join(SHIFTS)}, got {shift!r}")
    sigmas = torch.arange(steps, -1, -1, dtype=torch.float64) / int(steps / denoise)
    if shift == "by size":
        sigmas = shift_sigmas(sigmas, mu_for_tokens(seq_len))
    elif shift == "fixed":
        sigmas = shift_sigmas(sigmas, mu)
    return sigmas.float()
