"""Three distributions in the plane, and a network small enough to learn one in seconds.

Data and noise are points [B, 2]; data lies about 3 from the origin, noise has standard deviation 1. Every
draw is from a generator that the caller seeds, so that results are reproducible.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from ..flux_core.flow import GaussianMixture
from ..flux_core.train.checkpoint import WeightAverage

RING = GaussianMixture.ring(components=8, radius=4.0, std=0.2)

Draw = Callable[[int, Generator], Tensor]
"""(count, generator) -> points [count, 2]."""


def ring(count: int, generator: Generator) -> Tensor:
    """Eight Gaussians on a circle of radius 4."""
    return RING.sample(count, generator).float()


def checkerboard(count: int, generator: Generator) -> Tensor:
    """The black squares of a 4 x 4 board of side 8, evenly filled."""
    column = torch.randint(4, (count,), generator=generator)
    row = 2 * torch.randint(2, (count,), generator=generator) + column % 2
    within = torch.rand(count, 2, generator=generator)
    return 2 * (torch.stack([column, row], 1) + within) - 4


def moons(count: int, generator: Generator) -> Tensor:
    """Two interleaving half circles of radius 3, with noise of 0.2."""
    angle = math.pi * torch.rand(count, generator=generator)
    side = torch.randint(2, (count,), generator=generator) * 2.0 - 1
    x = 3 * angle.cos() - 1.5 * side
    y = side * (3 * angle.sin() - 0.75)
    return torch.stack([x, y], 1) + 0.2 * torch.randn(count, 2, generator=generator)


def noise(count: int, generator: Generator) -> Tensor:
    """Standard normal points."""
    return torch.randn(count, 2, generator=generator)


DATA: dict[str, Draw] = {"ring": ring, "checkerboard": checkerboard, "moons": moons}


class PlaneNetwork(nn.Module):
    """(x [B, 2], t [B]) -> a prediction [B, 2]: an MLP on points scaled by the data's extent."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        sizes = [3, *[width] * depth]
        layers: list[nn.Module] = []
        for before, after in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Linear(before, after), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x / 4, 2 * t[:, None] - 1], 1))


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: Adam, warm-up, cosine decay to 0, exponential average of the weights."""

    steps: int
    batch: int = 512
    rate: float = 8e-3
    warmup: int = 100
    average: float = 0.999


def train(
    network: PlaneNetwork,
    loss: Callable[[PlaneNetwork, int], Tensor],
    recipe: Recipe,
    progress: Callable[[], None],
) -> PlaneNetwork:
    """The network with averaged weights after training on `loss` (network, batch size -> losses [B])."""
    optimizer = torch.optim.Adam(network.parameters(), lr=recipe.rate, betas=(0.9, 0.99), fused=True)
    average = WeightAverage(network, recipe.average)
    for step in range(recipe.steps):
        share = min(1.0, (step + 1) / recipe.warmup) * (1 + math.cos(math.pi * step / recipe.steps)) / 2
        optimizer.param_groups[0]["lr"] = recipe.rate * share
        optimizer.zero_grad()
        loss(network, recipe.batch).mean().backward()
        optimizer.step()
        average.update()
        progress()
    network.load_state_dict(average.values)
    return network.requires_grad_(False)
