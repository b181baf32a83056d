"""Two numerical checks of the theory: the solvers' orders, and one network sampled in four ways."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Generator, Tensor

from ..flux_core.flow import (
    ChainPath,
    GaussianMixture,
    Network,
    RectifiedPath,
    as_rectified,
    as_velocity,
    sample_ancestral,
    sample_sde,
)
from ..flux_core.model.spec import Velocity
from ..flux_core.sampling.solver import SOLVERS, Solver, integrate

MIXTURE = GaussianMixture.isotropic(torch.tensor([[1.5, 0.5], [-1.0, 1.0], [0.0, -1.5]]).double(), 0.6)
STEPS = {1: 256, 2: 128, 3: 128, 4: 48, 5: 32}
"""Order -> steps at which the error follows the order and is far above rounding."""
EXACT = 2048  # steps of RK4 for the reference solution


def orders() -> dict[str, tuple[float, int]]:
    """(measured order, order of theory) of each deterministic solver.

    The slope of log error over log steps, between STEPS and twice as many equal steps, in float64 on the
    closed-form velocity of a mixture of three Gaussians, from noise at 1 to data at 0.
    """
    path = RectifiedPath()
    velocity = as_velocity(path, MIXTURE.network(path))
    start = torch.randn(32, 2, generator=Generator().manual_seed(0), dtype=torch.float64)
    exact: dict[float, Tensor] = {}
    measured: dict[str, tuple[float, int]] = {}
    for name, solver in SOLVERS.items():
        if getattr(solver, "is_random", False):
            continue  # it samples an SDE
        end = 0.5 if hasattr(solver, "rtol") else 0.0
        if end not in exact:
            exact[end] = equal_steps(SOLVERS["rk4"], velocity, start, EXACT, end)
        steps = STEPS[solver.order]
        errors = [
            (equal_steps(solver, velocity, start, count, end) - exact[end]).square().mean().sqrt().item()
            for count in (steps, 2 * steps)
        ]
        measured[name] = math.log2(errors[0] / errors[1]), solver.order
    return measured


def equal_steps(solver: Solver, velocity: Velocity, x: Tensor, steps: int, end: float) -> Tensor:
    """x at `end` after `steps` equal steps from 1.

    An adaptive solver gets one step at a time, with a tolerance that rejects none. It uses a method of lower
    order for the step to 0, so its order is measured before that.
    """
    sigmas = torch.linspace(1, end, steps + 1, dtype=torch.float64)
    if not hasattr(solver, "rtol"):
        return integrate(solver, velocity, x, sigmas)
    tolerant = replace(solver, rtol=1e12, atol=1e12)
    for sigma, after in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        x = integrate(tolerant, velocity, x, [sigma, after])
    return x


def bridge(chain: ChainPath, network: Network, generator: Generator) -> dict[str, Callable[[Tensor], Tensor]]:
    """One network that predicts the noise on the chain, in four samplers: title -> (noise -> data)."""
    times = torch.linspace(1, 0, chain.steps + 1, dtype=torch.float64)
    few = torch.linspace(1, 0, 33, dtype=torch.float64)
    heun = SOLVERS["heun"]

    def ddpm(x: Tensor) -> Tensor:
        return sample_ancestral(chain, network, x, generator=generator)

    def sde(x: Tensor) -> Tensor:
        return sample_sde(chain, network, x, times, of="noise", generator=generator)

    def ode(x: Tensor) -> Tensor:
        return integrate(heun, as_velocity(chain, network, "noise"), x, few)

    def flow(x: Tensor) -> Tensor:
        return integrate(heun, as_rectified(chain, network, "noise"), x, few)

    return {
        f"DDPM, {chain.steps} ancestral steps": ddpm,
        f"reverse SDE, {chain.steps} Euler-Maruyama steps": sde,
        "probability-flow ODE, 32 Heun steps": ode,
        "as a rectified flow, 32 Heun steps": flow,
    }
