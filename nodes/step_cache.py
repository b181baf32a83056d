"""MODEL -> MODEL that skips blocks where their output changes little (flux_core/sampling/step_cache.py)."""

from __future__ import annotations

from ..flux_core.sampling.step_cache import METHODS, Caching
from .host import current_host
from .widgets import choice, real, wire


class StepCache:
    """Skips most blocks in steps whose first block changes little. It needs many steps to be of use."""

    NODE_ID = "RectifluxStepCache"
    TITLE = "Step Cache"
    CATEGORY = "Rectiflux/sampling"
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    OUTPUT_TOOLTIPS = ("The model with a step cache. The input model is not changed.",)
    SEARCH_ALIASES = "teacache, fbcache, first block cache, easycache, taylorseer, wavespeed".split(", ")

    @classmethod
    def INPUT_TYPES(cls):
        method = "forecast extrapolates the skipped blocks' output from the last two computed steps. "
        method += "first block reuses that of the last one."
        threshold = "Relative change of the first block from which on a step is computed in full. "
        threshold += "0 skips nothing; more skips more and changes the image more."
        return {
            "required": {
                "model": wire("MODEL", "A model from Load FLUX Model."),
                "method": choice(METHODS, method, default="forecast"),
                "threshold": real(0.1, 0.0, 1.0, 0.01, threshold),
            }
        }

    def run(self, model, method, threshold):
        return (current_host().with_caching(model, Caching(method, threshold)),)


NODES = (StepCache,)
