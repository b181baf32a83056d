"""Name -> SAMPLER. The mathematics is flux_core/solver.py."""

from __future__ import annotations

from ..flux_core.solver import SOLVERS, solver_named
from . import _host


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
    SEARCH_ALIASES = ["sampler", "ksampler select", "euler", "heun", "midpoint", "rk4", "runge kutta"]

    @classmethod
    def INPUT_TYPES(cls):
        tooltip = (
            "euler: asks the model once a step, the usual choice. heun and midpoint: twice, second order. "
            "rk4: four times, fourth order, for reference."
        )
        return {"required": {"solver": (list(SOLVERS), {"default": "euler", "tooltip": tooltip})}}

    def run(self, solver):
        return (_host.make_sampler(solver_named(solver)),)


NODES = (ODESolver,)
