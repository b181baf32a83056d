"""A mixture whose densities, scores and samples are known exactly, and the paths that tests run along."""

from __future__ import annotations

import pytest
import torch
from rectiflux.flux_core.flow import (
    ChainPath,
    CosinePath,
    GaussianMixture,
    LinearBetaPath,
    Path,
    RectifiedPath,
    cosine_betas,
    linear_betas,
)

MIXTURE = GaussianMixture(
    torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64),
    torch.tensor([[-1.5, 0.0], [1.0, 1.0], [0.5, -1.5]], dtype=torch.float64),
    torch.tensor(
        [[[0.09, 0.05], [0.05, 0.16]], [[0.1, 0.0], [0.0, 0.1]], [[0.2, -0.1], [-0.1, 0.1]]],
        dtype=torch.float64,
    ),
)
PATHS: dict[str, Path] = {
    "rectified": RectifiedPath(),
    "linear": LinearBetaPath(),
    "cosine": CosinePath(),
    "linear chain": ChainPath(linear_betas(1000)),
    "cosine chain": ChainPath(cosine_betas(50)),
}
ALL = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
