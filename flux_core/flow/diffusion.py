"""Diffusion: DDPM's chain in both directions, and the SDEs that share a path's marginals.

  forward      dx = f x dt + g dw                          data to noise, as the path itself
  reverse      dx = [f x - g^2 score] dt + g dw            noise to data, dt < 0: the whole g^2
  flow (ODE)   dx = [f x - g^2/2 score] dt                 the half is in the ODE only
  family       dx = [v - h^2/2 score] dt + h dw, dt < 0    the same marginals for every h(t) >= 0

v is the velocity of the flow; h = 0 gives the ODE and h = g the reverse SDE, since v = f x - g^2/2 score.
With the half in the reverse SDE, or without it in the ODE, both sample another distribution.
Anderson 1982; Song et al. 2021 (arXiv:2011.13456), eq. 6 and 13; Albergo et al. 2023 (arXiv:2303.08797).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .path import Path, time_for
from .prediction import Network, batch_time, convert
from .variance_preserving import ChainPath

VARIANCES = ("posterior", "beta")
"""Variances of an ancestral step: beta_i (1 - alpha_bar_{i-1})/(1 - alpha_bar_i), exact if x_0 is one point,
or beta_i, exact if it is unit noise; data lie between. Ho et al. 2020, section 3.2."""


def forward_step(chain: ChainPath, x: Tensor, step: int, noise: Tensor) -> Tensor:
    """x_i = sqrt(1 - beta_i) x_{i-1} + sqrt(beta_i) noise, i = step in 1..T. Ho et al. 2020, eq. 2.

    i consecutive steps have the law of `chain.draw(x0, noise, i / T)`, eq. 4. Raises ValueError for a step
    outside 1..T.
    """
    beta = _beta(chain, step)
    return math.sqrt(1 - beta) * x + math.sqrt(beta) * noise


def ancestral_step(
    chain: ChainPath,
    x: Tensor,
    predicted_noise: Tensor,
    step: int,
    noise: Tensor,
    variance: str = "posterior",
) -> Tensor:
    """x_{i-1} = (x_i - beta_i/sqrt(1 - alpha_bar_i) predicted_noise)/sqrt(1 - beta_i) + s_i noise; step = i.

    s_i^2 by `variance`, one of VARIANCES; the step onto data, i = 1, adds no noise in either case. Ho et al.
    2020, algorithm 2. Raises ValueError for a step outside 1..T and another variance.
    """
    beta = _beta(chain, step)
    if variance not in VARIANCES:
        raise ValueError(f"the variance must be one of {', '.join(VARIANCES)}, got {variance!r}")
    bar = float(chain.alpha_bars[step - 1])
    mean = (x - beta / math.sqrt(1 - bar) * predicted_noise) / math.sqrt(1 - beta)
    if step == 1:
        return mean
    before = float(chain.alpha_bars[step - 2])
    added = beta if variance == "beta" else beta * (1 - before) / (1 - bar)
    return mean + math.sqrt(added) * noise


def sample_ancestral(
    chain: ChainPath,
    network: Network,
    x: Tensor,
    *,
    of: str = "noise",
    variance: str = "posterior",
    generator: torch.Generator | None = None,
) -> Tensor:
    """x_0 from x_T = x [B, ...] by all T ancestral steps; T evaluations of the network, at t = i/T.

    `of` is what the network predicts. Raises ValueError as `convert` and `ancestral_step` do.
    """
    for step in range(chain.steps, 0, -1):
        t = step / chain.steps
        predicted = convert(chain, network(x, batch_time(t, x)), of, "noise", x, t)
        x = ancestral_step(chain, x, predicted, step, _randn_like(x, generator), variance)
    return x


def sample_sde(
    path: Path,
    network: Network,
    x: Tensor,
    times: Tensor | Sequence[float],
    *,
    of: str = "velocity",
    noise_rate: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """x [B, ...] integrated from times[0] down to times[-1] along the family's SDE, by Euler-Maruyama.

    Strong order 1/2, weak order 1 (Kloeden and Platen 1992, section 10.2); one evaluation a step, none at the
    last time. `of` is what the network predicts; `noise_rate` is h(t), by default the path's own g, which
    makes it the reverse SDE. The rectified path's own g is infinite at t = 1: pass another, as sqrt(2 t).
    Raises ValueError for fewer than two times, times that don't descend, and what `convert` and
    `diffusion` raise.
    """
    grid = [float(t) for t in (times.tolist() if isinstance(times, Tensor) else times)]
    if len(grid) < 2 or any(after >= t for t, after in zip(grid[:-1], grid[1:], strict=True)):
        raise ValueError(
            f"times must be at least two and descend, from noise (1) to data (0), got {grid[:4]}..."
        )
    for t, after in zip(grid[:-1], grid[1:], strict=True):
        value = network(x, batch_time(t, x))
        velocity = convert(path, value, of, "velocity", x, t)
        score = convert(path, value, of, "score", x, t)
        rate = float((noise_rate or path.diffusion)(time_for(t, x)))
        drift = velocity - rate**2 / 2 * score
        x = x + (after - t) * drift + rate * math.sqrt(t - after) * _randn_like(x, generator)
    return x


def _beta(chain: ChainPath, step: int) -> float:
    if not 1 <= step <= chain.steps:
        raise ValueError(f"a step of this chain must lie between 1 and {chain.steps}, got {step}")
    return float(chain.betas[step - 1])


def _randn_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
