"""Training objectives: score matching, noise matching and flow matching, one regression on three targets.

Every loss is [B], the mean over a sample's elements; `.mean()` of it trains. The minimizer of each is the
conditional mean of its target given x_t, which is the marginal score or velocity (Vincent 2011; Lipman et al.
2023, arXiv:2210.02747, theorem 2), although the target is that of one pair. So the smallest loss
is not 0: on the rectified path it is E Var(noise - x_0 | x_t), larger for crossing pairs, and a falling loss
says little about sample quality near that floor.
"""

from __future__ import annotations

from torch import Tensor

from .path import Path, RectifiedPath, time_for
from .prediction import Network


def denoising_score_matching(network: Network, path: Path, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """sigma^2 |network + noise/sigma|^2 for a network that predicts the score: [B].

    Vincent 2011, section 4; the weight sigma^2 of Song and Ermon 2019 (arXiv:1907.05600, eq. 6) makes it
    |sigma network + noise|^2, equal to DDPM's loss for the noise -sigma network, and finite at t = 0. x0 and
    noise [B, ...], t [B]. Raises ValueError for a wrong t.
    """
    sigma = path.sigma(time_for(t, x0)).to(x0.dtype)
    return _mean_square(sigma * network(path.draw(x0, noise, t), t) + noise)


def noise_matching(network: Network, path: Path, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """|network - noise|^2 for a network that predicts the noise: [B]. Ho et al. 2020, eq. 14 (L_simple).

    x0 and noise [B, ...], t [B]. Raises ValueError for a wrong t.
    """
    return _mean_square(network(path.draw(x0, noise, t), t) - noise)


def flow_matching(network: Network, path: Path, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """|network - dx_t/dt|^2 for a network that predicts the velocity: [B]. Lipman et al. 2023, eq. 9.

    Conditional flow matching on any path. x0 and noise [B, ...], paired by a coupling or independent; t [B].
    Raises ValueError for a wrong t and where the path has no finite velocity.
    """
    return _mean_square(network(path.draw(x0, noise, t), t) - path.velocity(x0, noise, t))


def rectified_flow(network: Network, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """|network - (noise - x0)|^2 at (1 - t) x0 + t noise: [B]. Liu et al. 2023 (arXiv:2209.03003), eq. 1.

    Flow matching on the rectified path, the loss of FLUX's base model. x0 and noise [B, ...]; t [B]. Raises
    ValueError for a wrong t.
    """
    return flow_matching(network, RectifiedPath(), x0, noise, t)


def _mean_square(error: Tensor) -> Tensor:
    """[B, ...] -> [B]."""
    return error.square().flatten(1).mean(1)
