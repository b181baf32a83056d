"""Rectified flows and diffusions as a small library, for closed forms and for any network (x, t).

  path.py                  x_t = alpha x_0 + sigma noise, one interface; the rectified path
  variance_preserving.py   the diffusions' paths: linear beta, cosine alpha_bar, DDPM's discrete chain
  prediction.py            velocity, score, noise, data: conversions between all four
  mixture.py               a Gaussian mixture: exact densities and predictions
  diffusion.py             DDPM's forward and ancestral steps; the reverse SDE and its family
  bridge.py                a network on another path: a diffusion sampled as a rectified flow
  time_distribution.py     distributions of training times
  objective.py             score matching, flow matching, rectified flow
  coupling.py              pairs of noise and data: independent, optimal transport, reflow
  straightness.py          straightness and transport cost of a flow
  distance.py              energy distance between two samples
  likelihood.py            log p of a sample from the divergence along the ODE

Time is FLUX's throughout: 0 is data, 1 is noise, and on the rectified path it is sigma. ODEs are solved by
flux_core.sampling.solver. The public names are those of `__all__`.
"""

from .bridge import as_rectified, transfer
from .coupling import Coupling, independent, iterated_reflow, optimal_transport, reflow
from .diffusion import ancestral_step, forward_step, sample_ancestral, sample_sde
from .distance import energy_distance, energy_floor, mean_distance
from .likelihood import (
    bits_per_element,
    draw_probes,
    exact_divergence,
    hutchinson_divergence,
    log_likelihood,
    log_unit_gaussian,
)
from .mixture import GaussianMixture
from .objective import denoising_score_matching, flow_matching, noise_matching, rectified_flow
from .path import Path, RectifiedPath
from .prediction import KINDS, Network, as_velocity, convert
from .straightness import PathRecorder, straightness, transport_cost
from .time_distribution import LogitNormalTime, ModeTime, ShiftedTime, TimeDistribution, UniformTime
from .variance_preserving import (
    ChainPath,
    CosinePath,
    LinearBetaPath,
    VariancePreservingPath,
    cosine_betas,
    linear_betas,
)

__all__ = [
    "KINDS",
    "ChainPath",
    "CosinePath",
    "Coupling",
    "GaussianMixture",
    "LinearBetaPath",
    "LogitNormalTime",
    "ModeTime",
    "Network",
    "Path",
    "PathRecorder",
    "RectifiedPath",
    "ShiftedTime",
    "TimeDistribution",
    "UniformTime",
    "VariancePreservingPath",
    "ancestral_step",
    "as_rectified",
    "as_velocity",
    "bits_per_element",
    "convert",
    "cosine_betas",
    "denoising_score_matching",
    "draw_probes",
    "energy_distance",
    "energy_floor",
    "exact_divergence",
    "flow_matching",
    "forward_step",
    "hutchinson_divergence",
    "independent",
    "iterated_reflow",
    "linear_betas",
    "log_likelihood",
    "log_unit_gaussian",
    "mean_distance",
    "noise_matching",
    "optimal_transport",
    "rectified_flow",
    "reflow",
    "sample_ancestral",
    "sample_sde",
    "straightness",
    "transfer",
    "transport_cost",
]
