"""MODEL -> MODEL that skips steps whose result is known well enough (flux_core/sampling/step_cache.py)."""

from __future__ import annotations

from ..flux_core.sampling.step_cache import METHODS, Caching
from . import host_embedded as _host


class StepCache:
    """Makes runs of many steps faster: skips most of the model where little changes. Few steps: no use."""

    NODE_ID = "RectifluxStepCache"
    TITLE = "Step Cache"
    CATEGORY = "Rectiflux/sampling"
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model, skipping steps. The model that came in stays as it was.",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    SEARCH_ALIASES = [
        "teacache",
        "fbcache",
        "first block cache",
        "easycache",
        "taylorseer",
        "wavespeed",
        "faster",
    ]

    @classmethod
    def INPUT_TYPES(cls):
        method = (
            "forecast: what the skipped blocks would add is carried on in a straight line from the last two "
            "computed steps. first block: it is taken from the last computed step."
        )
        threshold = (
            "How much the first block may change before a step is computed again, as a part of its size. 0 "
            "skips nothing; more skips more and changes the picture more. The sampler's report says how many."
        )
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "A model from Load FLUX Model."}),
                "method": (list(METHODS), {"default": "forecast", "tooltip": method}),
                "threshold": (
                    "FLOAT",
                    {"default": 0.1, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": threshold},
                ),
            }
        }

    def run(self, model, method, threshold):
        return (_host.with_caching(model, Caching(method, threshold)),)


NODES = (StepCache,)
