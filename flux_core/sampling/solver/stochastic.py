"""Stochastic sampling of a rectified flow: Euler steps below the next sigma, and new noise up to it.

The paths x_sigma of a flow with velocity v have, at every sigma, the distribution that any of the SDEs

    dx = (v - g^2 / 2 score) dsigma + g dw  (descending sigma),  score = -(x + (1 - sigma) v) / sigma,

has too, for every g(sigma) (Song et al. 2021, arXiv:2011.13456, appendix D.1, for diffusion; the score is
that of the path x = (1 - sigma) image + sigma noise). A step here follows the ODE to sigma_down below the
next sigma sigma' and returns to it by

    x' = a x + b noise,  a = (1 - sigma') / (1 - sigma_down),  b^2 = sigma'^2 - a^2 sigma_down^2,

which maps (1 - sigma_down) image + sigma_down noise to (1 - sigma') image + sigma' noise exactly. So the
only error is that of the Euler step. For small steps it is the SDE above with g^2 = 2 eta sigma/(1 - sigma).
sigma_down is that of ComfyUI's euler_ancestral for rectified flows, so that eta and seed mean the same in
both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...model.spec import Velocity
from .base import Noise, OnStep, Result, Solver, fixed_step_loop


def seeded_noise(seed: int) -> Noise:
    """Standard normal noise for the steps of a run, drawn in float32 on the CPU, the same on every machine.

    From a generator of its own with seed + 1 (ComfyUI's rule for a CPU), because `seed` itself generates the
    initial noise. Raises ValueError for a seed outside 0..2^64 - 1.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"a seed must lie between 0 and 2^64 - 1, got {seed}")
    generator = torch.Generator("cpu").manual_seed((seed + 1) % 2**64)

    def draw(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator).to(x.device, x.dtype)

    return draw


def ancestral_coefficients(sigma: float, sigma_next: float, eta: float) -> tuple[float, float, float]:
    """(sigma_down, a, b) of the step to sigma_next > 0, see above; (sigma_next, 1, 0) at eta 0."""
    sigma_down = sigma_next * (1 - eta * (1 - sigma_next / sigma))
    a = (1 - sigma_next) / (1 - sigma_down)
    return sigma_down, a, max(0.0, sigma_next**2 - (a * sigma_down) ** 2) ** 0.5


@dataclass(frozen=True)
class EulerAncestral(Solver):
    """Euler with a noise amount `eta` in 0..1: 0 is Euler itself, 1 replaces most noise at every step.

    One evaluation per step, weak order 1 (of mean and variance). The last step adds no noise. Raises
    ValueError for eta outside 0..1 and, in a run, without `noise` or for sigmas that do not descend.
    """

    name: str = "euler_ancestral"
    order: int = 1
    eta: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta, the amount of noise, must lie between 0 and 1, got {self.eta}")

    @property
    def is_random(self) -> bool:
        return self.eta > 0.0

    def run(
        self, velocity: Velocity, x: Tensor, path: list[float], on_step: OnStep | None, noise: Noise | None
    ) -> Result:
        if noise is None and self.is_random:
            raise ValueError(
                f"{self.name} with eta {self.eta} needs noise for every step, got None; pass seeded_noise"
            )

        def advance(x: Tensor, v: Tensor, sigma: float, sigma_next: float) -> Tensor:
            if noise is None or not self.is_random or sigma_next == 0.0:
                return x + (sigma_next - sigma) * v
            if sigma_next > sigma:
                raise ValueError(
                    f"{self.name} adds noise only while sigmas descend, got sigmas that ascend from "
                    f"{sigma:.4g} to {sigma_next:.4g}; use eta 0"
                )
            sigma_down, a, b = ancestral_coefficients(sigma, sigma_next, self.eta)
            return a * (x + (sigma_down - sigma) * v) + b * noise(x)

        return fixed_step_loop(velocity, x, path, on_step, advance)
