"""Energy distance between two samples: an estimate of the distance of their distributions.

  D^2(P, Q) = 2 E|X - Y| - E|X - X'| - E|Y - Y'|     X, X' ~ P and Y, Y' ~ Q independent

is 0 for P = Q only. Szekely and Rizzo 2013 (Energy statistics, J. Stat. Plan. Inference 143, 1249-1272). It
needs no bandwidth, features or fitting, and suits a few dimensions, not the pixels of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 64  # rows at a time: their distances to some ten thousand points stay in the processor's cache


def mean_distance(x: Tensor, y: Tensor) -> float:
    """Mean Euclidean distance between a row of x [n, d] and a row of y [m, d], over all n m pairs.

    Differences of nearby points lose digits in |x|^2 + |y|^2 - 2xy, so the points are centered first; the
    mean over 10 000 float32 points agrees with float64 to about 1e-8. Raises ValueError for other shapes.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            "distances are between rows of two tables [n, d] and [m, d], "
            f"got {list(x.shape)} and {list(y.shape)}"
        )
    center = y.mean(0)
    x, y = x - center, y - center
    # one matmul gives the squared distances: [-2x, |x|^2, 1] . [y, 1, |y|^2]
    left = torch.cat([-2 * x, x.square().sum(1, keepdim=True), torch.ones_like(x[:, :1])], 1)
    right = torch.cat([y, torch.ones_like(y[:, :1]), y.square().sum(1, keepdim=True)], 1).T.contiguous()
    total = 0.0
    for rows in left.split(CHUNK):
        total += (rows @ right).clamp_(min=0).sqrt_().sum(1).sum(dtype=torch.float64).item()
    return total / (len(x) * len(y))


def energy_distance(x: Tensor, y: Tensor) -> float:
    """D^2 of samples x [n, d] and y [m, d]: including pairs of a point and itself, so never negative.

    For two samples of one distribution its mean is not 0 but `energy_floor`, with a spread of tens of percent
    for any sample size: average several. Raises ValueError for other shapes.
    """
    return 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)


def energy_floor(x: Tensor, m: int) -> float:
    """Mean of `energy_distance` between n and m points of one distribution, that of x [n, d].

    Exactly E|X - X'| (1/n + 1/m), here with an unbiased estimate of E|X - X'| on x: a lower bound for the
    expected distance of any model's samples. Raises ValueError for fewer than two points.
    """
    n = len(x)
    if n < 2:
        raise ValueError(f"the floor of a sample needs at least two points, got {n}")
    return mean_distance(x, x) * n / (n - 1) * (1 / n + 1 / m)
