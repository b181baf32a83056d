"""Exact log-likelihoods of a flow: the change of density along its ODE is the divergence of the velocity.

Along dx/dt = v(x, t), d log p_t(x_t)/dt = -div v, so with noise at t = 1

  log p_0(x_0) = log p_1(x_1) + integral from 0 to 1 of div v(x_t, t) dt

(Chen et al. 2018, arXiv:1806.07366, theorem 1; the sign is plus because time runs towards the noise). The
divergence is exact, by one backward pass per element of a sample, or Hutchinson's unbiased estimate from
random probes (Grathwohl et al. 2019, arXiv:1810.01367, section 3.1). Likelihoods are in nats;
`bits_per_element` converts them to bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..model.spec import Velocity
from ..sampling.solver import SOLVERS, Solver, integrate

PROBES = ("rademacher", "gaussian")
"""Random directions of Hutchinson's estimate; Rademacher's has the smaller variance."""


def exact_divergence(velocity: Velocity, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """(v, div v [B]): the trace of the Jacobian, by one backward pass per element of a sample.

    The velocity of one sample mustn't depend on another's.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        v = velocity(x, t)
        total = x.new_zeros(len(x))
        for i in range(v[0].numel()):
            row = v.flatten(1)[:, i].sum()
            total = total + _gradient(row, x).flatten(1)[:, i]
    return v.detach(), total.detach()


def draw_probes(
    x: Tensor, count: int, kind: str = "rademacher", generator: torch.Generator | None = None
) -> Tensor:
    """Random directions [count, B, ...] for x [B, ...], each element of mean 0 and variance 1, one of PROBES.

    Raises ValueError for fewer than one probe and for another kind.
    """
    if count < 1:
        raise ValueError(f"the divergence needs at least 1 probe, got {count}")
    if kind not in PROBES:
        raise ValueError(f"probes must be one of {', '.join(PROBES)}, got {kind!r}")
    normal = torch.randn((count, *x.shape), generator=generator, dtype=x.dtype, device=x.device)
    return normal if kind == "gaussian" else torch.where(normal < 0, -torch.ones_like(normal), 1)


def hutchinson_divergence(velocity: Velocity, x: Tensor, t: float, probes: Tensor) -> tuple[Tensor, Tensor]:
    """(v, an unbiased estimate of div v [B]): the mean of e . (dv/dx) e over probes e [P, B, ...].

    One backward pass per probe. Raises ValueError for probes that aren't of the shape of x.
    """
    if probes.shape[1:] != x.shape or not len(probes):
        raise ValueError(f"probes must be [P, *x.shape], got {list(probes.shape)} for x {list(x.shape)}")
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        v = velocity(x, t)
        total = x.new_zeros(len(x))
        for probe in probes:
            total = total + (_gradient((v * probe).sum(), x) * probe).flatten(1).sum(1)
    return v.detach(), total.detach() / len(probes)


def log_likelihood(
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    probes: Tensor | None = None,
    solver: Solver = SOLVERS["rk4"],
    log_prior: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """log p of x [B, ...] at sigmas[0] under the flow, in nats: [B], of the dtype of x, without gradients.

    `sigmas` ascend, from the data's time (0, or slightly more where the velocity is infinite) to 1;
    `log_prior` is the log density [B] there, by default that of unit Gaussian noise. The divergence is exact,
    or with probes [P, B, ...] (draw_probes) Hutchinson's estimate, the same probes at all times, so that the
    ODE's right-hand side is deterministic. The remaining error is the solver's. Raises ValueError for sigmas
    that don't ascend, an x without elements and probes of another shape.
    """
    grid = [float(sigma) for sigma in (sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas)]
    if any(after <= sigma for sigma, after in zip(grid[:-1], grid[1:], strict=True)):
        raise ValueError(f"a likelihood's sigmas ascend from data (0) to noise (1), got {grid[:4]}...")
    if x.ndim < 2 or not x.numel():
        raise ValueError(f"a likelihood is of samples [B, ...] with elements, got shape {list(x.shape)}")

    def augmented(state: Tensor, sigma: float) -> Tensor:
        """x with the integral of the divergence so far as one more element: one ODE for both."""
        at = state[:, :-1].reshape(x.shape)
        if probes is None:
            v, div = exact_divergence(velocity, at, sigma)
        else:
            v, div = hutchinson_divergence(velocity, at, sigma, probes)
        return torch.cat([v.flatten(1), div[:, None]], 1)

    state = integrate(solver, augmented, torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], 1).detach(), grid)
    end = state[:, :-1].reshape(x.shape)
    return (log_prior or log_unit_gaussian)(end) + state[:, -1]


def log_unit_gaussian(x: Tensor) -> Tensor:
    """log N(x; 0, I) of x [B, ...] in nats: [B]."""
    flat = x.flatten(1)
    return -(flat.square().sum(1) + flat.shape[1] * math.log(2 * math.pi)) / 2


def bits_per_element(log_prob: Tensor, elements: int) -> Tensor:
    """-log2 p per element of a sample, from log p in nats [B]: [B].

    Of 8-bit data scaled to -1..1 this is the density's; add 7 for the bits of the data themselves.
    """
    return -log_prob / (elements * math.log(2))


def _gradient(value: Tensor, x: Tensor) -> Tensor:
    """d value/dx, 0 where it doesn't depend on x."""
    if not value.requires_grad:
        return torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(value, x, retain_graph=True, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient
