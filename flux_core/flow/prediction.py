"""Predictions of a network along a path, and their conversion into each other.

At x_t = alpha x_0 + sigma noise a network can be trained for any of four means given x_t:

  data      E[x_0 | x_t]              "denoised"
  noise     E[noise | x_t]            DDPM's epsilon
  velocity  alpha' data + sigma' noise
  score     grad log p_t(x_t) = -noise / sigma

They are linear in each other, so each determines the other three. On the rectified path:

  data = x - t v        noise = x + (1 - t) v        score = -(x + (1 - t) v) / t

The score of DDPM is -noise/sqrt(1 - alpha_bar_t), with the cumulative product alpha_bar_t, not -noise/sqrt(1
- alpha_t): its denominator is the sigma of x_t. Song et al. 2021 (arXiv:2011.13456), section 3; Lipman et al.
2024 (arXiv:2412.06264).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..model.spec import Velocity
from .path import Path, Time, time_for

KINDS = ("velocity", "score", "noise", "data")
"""The kinds of prediction."""

Network = Callable[[Tensor, Tensor], Tensor]
"""(x [B, ...], t [B] in [0, 1]) -> a prediction of the shape of x; all that is known of a network."""


def convert(path: Path, value: Tensor, of: str, to: str, x: Tensor, t: Time) -> Tensor:
    """The prediction `to` that is equivalent to the prediction `of` with this value at (x, t), shaped as x.

    `of` and `to` are of KINDS. Raises ValueError for another kind, a wrong t, and at an end of the path where
    one doesn't determine the other: where sigma is 0 data does not determine noise and the score is infinite,
    where alpha is 0 noise and score do not determine data. A velocity determines data and noise
    everywhere on the rectified path, both ends included.
    """
    for kind in (of, to):
        if kind not in KINDS:
            raise ValueError(f"a prediction must be one of {', '.join(KINDS)}, got {kind!r}")
    time = time_for(t, x)
    if of == to:
        return value
    if to == "data":
        return _data(path, value, of, to, x, time)
    if to == "noise":
        return _noise(path, value, of, to, x, time)
    if to == "score":
        sigma = path.sigma(time)
        return -_noise(path, value, of, to, x, time) / _nonzero(sigma, "sigma", of, to, time).to(x.dtype)
    alpha_rate, sigma_rate = path.rates(time)
    data, noise = _data(path, value, of, to, x, time), _noise(path, value, of, to, x, time)
    return alpha_rate.to(x.dtype) * data + sigma_rate.to(x.dtype) * noise


def as_velocity(path: Path, network: Network, of: str = "velocity") -> Velocity:
    """The network's prediction as dx/dt on `path`: the input of solver.integrate.

    Along a diffusion's path this is the probability-flow ODE, dx = [f x - g^2/2 score] dt; the half is
    in the ODE only, the reverse SDE has the whole g^2. Song et al. 2021, eq. 13. The velocity raises what
    `convert` raises.
    """

    def velocity(x: Tensor, t: float) -> Tensor:
        return convert(path, network(x, batch_time(t, x)), of, "velocity", x, t)

    return velocity


def batch_time(t: float, x: Tensor) -> Tensor:
    """t as a network expects it: [B], in the dtype and on the device of x [B, ...]."""
    return x.new_full((len(x),), t)


def _data(path: Path, value: Tensor, of: str, to: str, x: Tensor, t: Tensor) -> Tensor:
    """E[x_0 | x_t] from any prediction; `to` is for the message."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    if of == "data":
        return value
    if of == "velocity":
        rate = path.rates(t)[1]
        return (rate.to(x.dtype) * x - sigma.to(x.dtype) * value) / _determinant(path, t).to(x.dtype)
    noise = value if of == "noise" else -sigma.to(x.dtype) * value
    return (x - sigma.to(x.dtype) * noise) / _nonzero(alpha, "alpha", of, to, t).to(x.dtype)


def _noise(path: Path, value: Tensor, of: str, to: str, x: Tensor, t: Tensor) -> Tensor:
    """E[noise | x_t] from any prediction; `to` is for the message."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    if of == "noise":
        return value
    if of == "score":
        return -sigma.to(x.dtype) * value
    if of == "velocity":
        rate = path.rates(t)[0]
        return (alpha.to(x.dtype) * value - rate.to(x.dtype) * x) / _determinant(path, t).to(x.dtype)
    return (x - alpha.to(x.dtype) * value) / _nonzero(sigma, "sigma", of, to, t).to(x.dtype)


def _determinant(path: Path, t: Tensor) -> Tensor:
    """alpha sigma' - sigma alpha' > 0, the determinant of (data, noise) -> (x, velocity); 1 if rectified."""
    alpha_rate, sigma_rate = path.rates(t)
    return path.alpha(t) * sigma_rate - path.sigma(t) * alpha_rate


def _nonzero(share: Tensor, name: str, of: str, to: str, t: Tensor) -> Tensor:
    """The share, checked. Raises ValueError where it is 0."""
    if bool((share == 0).any()):
        where = float(t.broadcast_to(share.shape)[share == 0].flatten()[0])
        raise ValueError(
            f"the {of} doesn't determine the {to} at t = {where:g}, where {name} is 0; keep t inside (0, 1)"
        )
    return share
