"""Name, or a method's own settings -> SAMPLER. The mathematics is flux_core/sampling/solver/."""

from __future__ import annotations

from ..flux_core.sampling.solver import SOLVERS, DormandPrince, EulerAncestral, solver_named
from . import host_embedded as _host


class ODESolver:
    """Chooses how a step is taken. Better methods ask the model several times a step and need fewer steps."""

    NODE_ID = "RectifluxSolver"
    TITLE = "ODE Solver"
    CATEGORY = "Rectiflux/sampling"
    RETURN_TYPES = ("SAMPLER",)
    RETURN_NAMES = ("sampler",)
    OUTPUT_TOOLTIPS = ("The method, for FLUX Sampler or for ComfyUI's SamplerCustomAdvanced.",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    SEARCH_ALIASES = [
        "sampler",
        "ksampler select",
        "euler",
        "heun",
        "midpoint",
        "rk4",
        "runge kutta",
        "adams bashforth",
    ]

    @classmethod
    def INPUT_TYPES(cls):
        tooltip = (
            "Order, and model calls a step. euler: 1, 1; the usual choice. heun, midpoint: 2, 2. rk4: 4, 4; "
            "for reference. heun_corrected: 2, 2 (1 in the last step). ab2: 2, 1. ab3: 3, 1 (2 in the first "
            "step). dormand_prince: 5, 6, in steps of its own, see Adaptive Solver. euler_ancestral: 1, 1, "
            "adds noise on the way, see Stochastic Solver."
        )
        return {"required": {"solver": (list(SOLVERS), {"default": "euler", "tooltip": tooltip})}}

    def run(self, solver):
        return (_host.make_sampler(solver_named(solver)),)


class AdaptiveSolver:
    """Takes as many steps as a tolerance needs, by Dormand-Prince. The schedule gives only a first guess."""

    NODE_ID = "RectifluxAdaptiveSolver"
    TITLE = "Adaptive Solver"
    CATEGORY = "Rectiflux/sampling"
    RETURN_TYPES = ("SAMPLER",)
    RETURN_NAMES = ("sampler",)
    OUTPUT_TOOLTIPS = ("The method, for FLUX Sampler or for ComfyUI's SamplerCustomAdvanced.",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    SEARCH_ALIASES = ["dormand prince", "dopri5", "rk45", "dpm adaptive", "adaptive", "tolerance"]

    @classmethod
    def INPUT_TYPES(cls):
        rtol = (
            "How large an error of a step may be, relative to the latent's values. 0.02 takes some 50 model "
            "calls; smaller is more exact and slower. Order 5, 6 calls a step. Of the schedule only its ends "
            "count, and its first step as a first guess: steps sets no more than that."
        )
        atol = "What is added to it for values near 0. As large as rtol, as a rule."
        limit = "Gives up with an error when so many model calls do not suffice."
        default = DormandPrince()
        tolerance = {"min": 0.00001, "max": 1.0, "step": 0.001, "round": False}
        return {
            "required": {
                "rtol": ("FLOAT", {"default": default.rtol, **tolerance, "tooltip": rtol}),
                "atol": ("FLOAT", {"default": default.atol, **tolerance, "tooltip": atol}),
                "max_evaluations": (
                    "INT",
                    {"default": default.max_evaluations, "min": 9, "max": 100_000, "tooltip": limit},
                ),
            }
        }

    def run(self, rtol, atol, max_evaluations):
        return (_host.make_sampler(DormandPrince(rtol=rtol, atol=atol, max_evaluations=max_evaluations)),)


class StochasticSolver:
    """Euler that replaces some of the noise at every step. The same seed still gives the same picture."""

    NODE_ID = "RectifluxStochasticSolver"
    TITLE = "Stochastic Solver"
    CATEGORY = "Rectiflux/sampling"
    RETURN_TYPES = ("SAMPLER",)
    RETURN_NAMES = ("sampler",)
    OUTPUT_TOOLTIPS = ("The method, for FLUX Sampler or for ComfyUI's SamplerCustomAdvanced.",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    SEARCH_ALIASES = ["euler ancestral", "sde", "eta", "noise amount", "sampler euler ancestral", "churn"]

    @classmethod
    def INPUT_TYPES(cls):
        tooltip = (
            "How much noise is replaced: 0 is euler, 1 is the most. It makes up for errors of earlier steps, "
            "and wants more steps. Order 1, 1 model call a step."
        )
        eta = {"default": EulerAncestral().eta, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": tooltip}
        return {"required": {"eta": ("FLOAT", eta)}}

    def run(self, eta):
        return (_host.make_sampler(EulerAncestral(eta=eta)),)


NODES = (ODESolver, AdaptiveSolver, StochasticSolver)
