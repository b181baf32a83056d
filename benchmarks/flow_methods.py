"""Five ways from noise to data, trained on points of the plane one after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..flux_core.flow import (
    ChainPath,
    ModeTime,
    Path,
    RectifiedPath,
    TimeDistribution,
    UniformTime,
    as_velocity,
    iterated_reflow,
    linear_betas,
    noise_matching,
    optimal_transport,
    rectified_flow,
    transport_cost,
)
from ..flux_core.model.spec import Velocity
from ..flux_core.sampling.solver import SOLVERS
from .flow_plane import Draw, PlaneNetwork, Recipe, noise, train

Progress = Callable[[str], None]
"""Called at every step of a training, with the title of what is trained."""

TITLES = {
    "diffusion": "diffusion (DDPM)",
    "flow_matching": "flow matching = 1-rectified",
    "transport": "OT flow matching",
    "rectified_2": "2-rectified",
    "rectified_3": "3-rectified",
}


@dataclass(frozen=True)
class Plan:
    """How large each training is; `recipes` have the keys of TITLES."""

    recipes: dict[str, Recipe]
    width: int = 128
    depth: int = 3
    chain: int = 200  # steps of DDPM
    matched: int = 256  # rows among which optimal pairs are sought
    pairs: int = 65_536  # that optimal transport and each round of reflow make
    pair_steps: int = 12  # of the midpoint method, for a pair of reflow


@dataclass(frozen=True)
class Method:
    """What came out: a velocity, the transport cost of the pairs that it learned from, seconds."""

    velocity: Velocity
    pairs_cost: float
    seconds: float


@dataclass(frozen=True)
class Flow:
    """A network that predicts the velocity of the rectified path, as integrate() takes it."""

    network: PlaneNetwork

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        return self.network(x, x.new_full((len(x),), sigma))


class Laboratory:
    """The five methods on one distribution; what one of them makes the next may use."""

    def __init__(self, draw: Draw, plan: Plan, seed: int, progress: Progress) -> None:
        torch.manual_seed(seed)  # of the initial weights
        self.generator = Generator().manual_seed(seed)
        self.draw, self.plan, self.progress = draw, plan, progress
        self.chain = chain_path(plan.chain)
        self.noise_network = self.network()

    def run(self) -> Iterator[tuple[str, Method]]:
        """(key of TITLES, method) as they are finished."""
        yield "diffusion", self.diffusion()
        first = self.flow_matching()
        yield "flow_matching", first
        yield "transport", self.transport()
        yield from self.reflowed(first.velocity)

    def diffusion(self) -> Method:
        """A network that predicts the noise on DDPM's chain; its velocity is the probability-flow ODE."""
        start = time.perf_counter()

        def loss(network: PlaneNetwork, count: int) -> Tensor:
            x0, z, t = self.averaged(self.chain, count)
            return noise_matching(network, self.chain, x0, z, t)

        network = self.train("diffusion", self.noise_network, loss)
        cost = transport_cost(*self.fresh(self.plan.pairs))
        return Method(as_velocity(self.chain, network, "noise"), cost, time.perf_counter() - start)

    def flow_matching(self) -> Method:
        """Flow matching on independent pairs: the 1-rectified flow."""
        start = time.perf_counter()

        def loss(network: PlaneNetwork, count: int) -> Tensor:
            return rectified_flow(network, *self.averaged(RectifiedPath(), count))

        network = self.train("flow_matching", self.network(), loss)
        return Method(
            Flow(network), transport_cost(*self.fresh(self.plan.pairs)), time.perf_counter() - start
        )

    def transport(self) -> Method:
        """Flow matching on pairs that are optimal within batches; a store of them, for they take a while."""
        start = time.perf_counter()
        batches = [
            optimal_transport(*self.fresh(self.plan.matched))
            for _ in range(self.plan.pairs // self.plan.matched)
        ]
        x0, z = (torch.cat(parts) for parts in zip(*batches, strict=True))
        network = self.learn_pairs("transport", self.network(), x0, z, UniformTime())
        return Method(Flow(network), transport_cost(x0, z), time.perf_counter() - start)

    def reflowed(self, velocity: Velocity) -> Iterator[tuple[str, Method]]:
        """The 2- and the 3-rectified flow, each from the weights of the flow before."""
        keys = ("rectified_2", "rectified_3")
        costs: list[float] = []

        def learn(before: Velocity, x0: Tensor, z: Tensor) -> Velocity:
            if not isinstance(before, Flow):
                raise TypeError(f"reflow begins from a Flow's weights, got {type(before).__name__}")
            key, network = keys[len(costs)], deepcopy(before.network).requires_grad_(True)
            costs.append(transport_cost(x0, z))
            return Flow(self.learn_pairs(key, network, x0, z, EndTimes()))

        def fresh_noise() -> Tensor:
            return noise(self.plan.pairs, self.generator)

        sigmas = torch.linspace(1, 0, self.plan.pair_steps + 1)
        flows = iterated_reflow(velocity, learn, fresh_noise, sigmas, SOLVERS["midpoint"])
        for key in keys:
            start = time.perf_counter()
            flow = next(flows)
            yield key, Method(flow, costs[-1], time.perf_counter() - start)

    def network(self) -> PlaneNetwork:
        return PlaneNetwork(self.plan.width, self.plan.depth)

    def fresh(self, count: int) -> tuple[Tensor, Tensor]:
        """Data and noise [count, 2], independent of each other."""
        return self.draw(count, self.generator), noise(count, self.generator)

    def averaged(self, path: Path, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """(x0, noise, t) of independent pairs, with less scatter; see `posterior_mean`."""
        x0, z = self.fresh(count)
        t = UniformTime().sample(count, self.generator)
        return *posterior_mean(path, x0, z, t), t

    def learn_pairs(
        self, key: str, network: PlaneNetwork, x0: Tensor, z: Tensor, times: TimeDistribution
    ) -> PlaneNetwork:
        """The network after learning the velocity of stored pairs, drawn at random."""

        def loss(network: PlaneNetwork, count: int) -> Tensor:
            rows = torch.randint(len(x0), (count,), generator=self.generator)
            return rectified_flow(network, x0[rows], z[rows], times.sample(count, self.generator))

        return self.train(key, network, loss)

    def train(
        self, key: str, network: PlaneNetwork, loss: Callable[[PlaneNetwork, int], Tensor]
    ) -> PlaneNetwork:
        return train(network, loss, self.plan.recipes[key], lambda: self.progress(TITLES[key]))


@dataclass(frozen=True)
class EndTimes:
    """Times for a flow that is nearly straight and shall take few steps: most of them at the ends.

    `share` of them are 1, the only time that a one-step sampler asks for; the others are from a density that
    is higher towards both ends, as Lee et al. 2024 (arXiv:2405.20320) found it best for 2-rectified flows.
    """

    share: float = 0.7

    def sample(
        self, count: int, generator: Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        t = ModeTime(-0.8).sample(count, generator, dtype)
        t[: round(self.share * count)] = 1.0
        return t

    def density(self, t: Tensor) -> Tensor:
        """Of the part below 1, [0, 1)."""
        return (1 - self.share) * ModeTime(-0.8).density(t)


def chain_path(steps: int) -> ChainPath:
    """DDPM's chain of linear betas in `steps` steps, as noisy at the end as Ho et al.'s 1000."""
    return ChainPath(linear_betas(steps, 0.1 / steps, 20 / steps))


def posterior_mean(path: Path, x0: Tensor, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """E[x0 | x_t] and E[noise | x_t] [B, 2] at the points x_t = alpha x0 + sigma noise of independent pairs.

    Estimated over the data of the batch: its means have the same x_t and lead to the same minimum, but
    scatter far less where much noise leaves it open which data x_t came from. The stable target of Xu et al.
    2023 (arXiv:2302.00670), whose bias vanishes with the size of the batch.
    """
    alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
    x = alpha * x0 + sigma * z
    # log weights -|x - alpha x0|^2 / (2 sigma^2) less the part with |x|^2, which softmax doesn't see
    share = alpha / sigma.square()
    left = torch.cat([share * x, -alpha / 2 * share], 1)
    mean = (left @ torch.cat([x0, x0.square().sum(1, keepdim=True)], 1).T).softmax(1) @ x0
    return mean, (x - alpha * mean) / sigma
