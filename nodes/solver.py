"""Name, or a method's own settings -> SAMPLER (flux_core/sampling/solver/)."""

from __future__ import annotations

from ..flux_core.sampling.solver import SOLVERS, DormandPrince, EulerAncestral, solver_named
from .host import current_host
from .widgets import choice, integer, real

SAMPLER = "The solver, for FLUX Sampler or for ComfyUI's SamplerCustomAdvanced."


class ODESolver:
    """The method that takes the steps. Higher orders call the model more often and need fewer steps."""

    NODE_ID = "RectifluxSolver"
    TITLE = "ODE Solver"
    CATEGORY = "Rectiflux/sampling"
    RETURN_TYPES = ("SAMPLER",)
    RETURN_NAMES = ("sampler",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    OUTPUT_TOOLTIPS = (SAMPLER,)
    SEARCH_ALIASES = "ksampler select, euler, heun, midpoint, rk4, runge kutta, adams bashforth".split(", ")

    @classmethod
    def INPUT_TYPES(cls):
        solver = "euler is the usual choice; ab2 is more exact at the same cost. "
        solver += "The help page lists the order and the model calls per step of each."
        return {"required": {"solver": choice(SOLVERS, solver, default="euler")}}

    def run(self, solver):
        return (current_host().make_sampler(solver_named(solver)),)


class AdaptiveSolver:
    """Takes as many steps as a tolerance needs, by Dormand-Prince. The schedule gives only a first guess."""

    NODE_ID = "RectifluxAdaptiveSolver"
    TITLE = "Adaptive Solver"
    CATEGORY = "Rectiflux/sampling"
    RETURN_TYPES = ("SAMPLER",)
    RETURN_NAMES = ("sampler",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    OUTPUT_TOOLTIPS = (SAMPLER,)
    SEARCH_ALIASES = "dormand prince, dopri5, rk45, dpm adaptive, adaptive, tolerance".split(", ")

    @classmethod
    def INPUT_TYPES(cls):
        rtol = "The largest error of a step, relative to the latent's values. "
        rtol += "0.02 takes some 50 model calls; smaller is more exact and slower."
        atol = "The error allowed for values near 0, usually as large as rtol."
        limit = "The run ends with an error when this many model calls do not suffice."
        default = DormandPrince()
        return {
            "required": {
                "rtol": real(default.rtol, 0.00001, 1.0, 0.001, rtol, round=False),
                "atol": real(default.atol, 0.00001, 1.0, 0.001, atol, round=False),
                "max_evaluations": integer(default.max_evaluations, 9, 100_000, limit),
            }
        }

    def run(self, rtol, atol, max_evaluations):
        solver = DormandPrince(rtol=rtol, atol=atol, max_evaluations=max_evaluations)
        return (current_host().make_sampler(solver),)


class StochasticSolver:
    """Euler that replaces some of the noise at every step. The same seed still gives the same image."""

    NODE_ID = "RectifluxStochasticSolver"
    TITLE = "Stochastic Solver"
    CATEGORY = "Rectiflux/sampling"
    RETURN_TYPES = ("SAMPLER",)
    RETURN_NAMES = ("sampler",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    OUTPUT_TOOLTIPS = (SAMPLER,)
    SEARCH_ALIASES = "euler ancestral, sde, eta, noise amount, sampler euler ancestral, churn".split(", ")

    @classmethod
    def INPUT_TYPES(cls):
        eta = "How much noise is replaced: 0 is euler, 1 is the most. "
        eta += "It corrects errors of earlier steps, and needs more steps."
        return {"required": {"eta": real(EulerAncestral().eta, 0.0, 1.0, 0.01, eta)}}

    def run(self, eta):
        return (current_host().make_sampler(EulerAncestral(eta=eta)),)


NODES = (ODESolver, AdaptiveSolver, StochasticSolver)
