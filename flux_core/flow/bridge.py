"""One network on another path: a diffusion model is a flow at another scale and time.

Two paths are equally noisy where sigma/(alpha + sigma), the level, is the same; there x/(alpha + sigma) has
the same law on both, and so have data and noise given x. To the rectified path:

  x_rectified = x / (alpha + sigma)        t_rectified = sigma / (alpha + sigma)

So a network that was trained once, for any prediction on any path, is sampled as DDPM, as an SDE, as the
probability-flow ODE and as a rectified flow. Karras et al. 2022 (arXiv:2206.00364), appendix B, for the
change of scale; Gao et al. 2024, "Diffusion meets flow matching".
"""

from __future__ import annotations

from torch import Tensor

from ..model.spec import Velocity
from .path import Path, RectifiedPath, time_for
from .prediction import Network, as_velocity, convert


def transfer(network: Network, of: str, source: Path, target: Path, to: str) -> Network:
    """A network that predicts `to` on path `target`, from one that predicts `of` on path `source`.

    At levels above the source's last (alpha(1) > 0 on a linear-beta path), its prediction of the data at its
    own t = 1 is used, an error of the order of that alpha. The network raises ValueError as `convert` does:
    at t = 0 unless `to` is data, and at t = 1 from noise or score of a source with alpha(1) = 0, which do not
    determine the data there: start a little below 1.
    """

    def moved(x: Tensor, t: Tensor) -> Tensor:
        time = time_for(t, x)
        alpha, sigma = target.alpha(time), target.sigma(time)
        time_there = source.time_at(sigma / (alpha + sigma))
        scale = (source.alpha(time_there) + source.sigma(time_there)) / (alpha + sigma)
        x_there = x * scale.to(x.dtype)
        t_there = time_there.reshape(t.shape)
        data = convert(source, network(x_there, t_there), of, "data", x_there, t_there)
        return convert(target, data, "data", to, x, t)

    return moved


def as_rectified(path: Path, network: Network, of: str) -> Velocity:
    """The network's prediction on `path` as a velocity of the rectified path, for FLUX's own samplers.

    x and sigma are the rectified path's; x / (alpha + sigma) converts a starting point from `path`. Raises
    what `transfer` raises.
    """
    rectified = RectifiedPath()
    return as_velocity(rectified, transfer(network, of, path, rectified, "velocity"))
