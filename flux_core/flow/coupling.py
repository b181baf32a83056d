"""Couplings: which noise is paired with which data on the straight paths of a flow.

A coupling gives pairs (x0, noise), two tensors of one shape [B, ...]: points of a plane, latents, anything.
Time runs as in FLUX, 0 at the data and 1 at the noise; a network that learns noise - x0 at the points
(1 - t) x0 + t noise of the pairs gives a flow with the pairs' marginals at both ends for every coupling
(Liu et al. 2022, arXiv:2209.03003, theorem 3.3). The coupling determines how straight the flow is and how
far it transports: independent pairs cross, optimal-transport pairs rarely, the flow's own pairs never.

Rectified flow is not optimal transport: each round of reflow lowers every convex cost of the coupling and
straightens its paths (theorems 3.5 and 3.7 there), but the limit need not be the cheapest coupling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..model.spec import Velocity
from ..sampling.solver import Solver, integrate

Coupling = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x0 [B, ...], noise [B, ...]) -> the same rows, paired: x0 and noise of the same shapes."""

Learn = Callable[[Velocity, Tensor, Tensor], Velocity]
"""(velocity to start from, x0, noise) -> a velocity that has learned noise - x0 on these pairs."""


def independent(x0: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """x0 and noise in their given order: the coupling of flow matching and of the 1-rectified flow.

    Raises ValueError for different shapes.
    """
    _check_pairs(x0, noise)
    return x0, noise


def optimal_transport(x0: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """x0 unchanged, and the rows of noise in the order that minimizes the sum of |x0 - noise|^2.

    Exact within the batch of B rows, by the assignment problem, O(B^3) at worst; for the whole distributions
    it is an estimate that improves with the batch size. Tong et al. 2023 (arXiv:2302.00482, minibatch
    OT-CFM), Pooladian et al. 2023 (arXiv:2304.14772). Only noise is reordered, so that captions stay with
    their rows of x0; for captioned data the noise then depends on the caption, which sampling does not
    reproduce: meant for unconditional flows. Raises ValueError for different shapes, NaN or inf.
    """
    from scipy.optimize import linear_sum_assignment  # a slow import that only this function needs

    _check_pairs(x0, noise)
    # |x0 - noise|^2 summed over pairs is a constant minus twice the inner products
    inner = x0.detach().flatten(1).double() @ noise.detach().flatten(1).double().T
    if not inner.isfinite().all():
        raise ValueError(
            "optimal transport needs finite x0 and noise, got NaN or inf; check what produced them"
        )
    _, order = linear_sum_assignment(inner.cpu().numpy(), maximize=True)
    return x0, noise[torch.from_numpy(order).to(noise.device)]


def reflow(
    velocity: Velocity,
    noise: Tensor,
    sigmas: Tensor | Sequence[float],
    solver: Solver,
    chunk: int = 4096,
) -> tuple[Tensor, Tensor]:
    """(x0, noise): each row of noise with the end point of the model's own ODE from it.

    The coupling of the next rectified flow, Liu et al. 2022 (arXiv:2209.03003, algorithm 1); deterministic.
    `sigmas` descend from 1 to 0; the next flow learns the solver's errors on them too. `chunk` rows are
    integrated at a time, without gradients. Raises ValueError for sigmas that don't lead from 1 to 0.
    """
    ends = float(sigmas[0]), float(sigmas[-1])
    if ends != (1.0, 0.0):
        raise ValueError(
            f"reflow pairs lead from sigma 1 (noise) to 0 (data), got {ends[0]:g} to {ends[1]:g}"
        )
    with torch.no_grad():
        parts = [integrate(solver, velocity, part, sigmas) for part in noise.split(chunk)]
    return torch.cat(parts), noise


def iterated_reflow(
    velocity: Velocity,
    learn: Learn,
    draw_noise: Callable[[], Tensor],
    sigmas: Tensor | Sequence[float],
    solver: Solver,
) -> Iterator[Velocity]:
    """Velocities of the 2-, 3-, ... rectified flow, endlessly, from that of the 1-rectified flow.

    Each round draws fresh noise, pairs it by the flow before, and learns from the pairs. The caller stops:
    `itertools.islice(iterated_reflow(...), 2)` gives two rounds. Liu et al. 2022 (arXiv:2209.03003, the
    k-rectified flow). Errors of each round accumulate: do no more rounds than straightness needs.
    """
    while True:
        x0, noise = reflow(velocity, draw_noise(), sigmas, solver)
        velocity = learn(velocity, x0, noise)
        yield velocity


def _check_pairs(x0: Tensor, noise: Tensor) -> None:
    if x0.shape != noise.shape:
        raise ValueError(
            f"a coupling pairs x0 and noise of one shape, got {list(x0.shape)} and {list(noise.shape)}"
        )
