"""The theory that FLUX stands on, as a small library over closed forms and any network.

path.py                  x_t = alpha x_0 + sigma noise, one interface; the rectified path
variance_preserving.py   the diffusions' paths: linear beta, cosine alpha_bar, DDPM's discrete chain
"""

from .path import Path, RectifiedPath
from .variance_preserving import (
    ChainPath,
    CosinePath,
    LinearBetaPath,
    VariancePreservingPath,
    cosine_betas,
    linear_betas,
)

__all__ = [
    "ChainPath",
    "CosinePath",
    "LinearBetaPath",
    "Path",
    "RectifiedPath",
    "VariancePreservingPath",
    "cosine_betas",
    "linear_betas",
]
