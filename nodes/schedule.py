"""LATENT, steps -> SIGMAS. The mathematics is flux_core/sampling/schedule.py."""

from __future__ import annotations

from ..flux_core.sampling.schedule import FIXED_MU, SHIFTS, make_sigmas
from .wires import token_count


class Schedule:
    """Decides in how many steps noise becomes a picture, and how they are spread along the way."""

    NODE_ID = "RectifluxSchedule"
    TITLE = "Rectified-Flow Schedule"
    CATEGORY = "Rectiflux/sampling"
    RETURN_TYPES = ("SIGMAS",)
    RETURN_NAMES = ("sigmas",)
    OUTPUT_TOOLTIPS = ("Noise levels from 1 (noise) down to 0 (picture), one more than there are steps.",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    SEARCH_ALIASES = ["steps", "sigmas", "scheduler", "denoise", "flux shift", "basic scheduler"]

    @classmethod
    def INPUT_TYPES(cls):
        steps = "More steps, finer pictures, longer waiting. [dev] 20 to 28, [schnell] 4, the miniature 20."
        denoise = (
            "1 starts from pure noise. Below 1 keeps something of the latent, for image to image: "
            "0.3 retouches, 0.8 repaints."
        )
        shift = (
            "How much of the path is spent near noise. by size: more for larger pictures, as [dev] expects; "
            "none: evenly, as [schnell] expects; fixed: by mu."
        )
        mu = "The shift when it is fixed; 1.15 is what by size gives 1024 x 1024 pixels."
        return {
            "required": {
                "latent": ("LATENT", {"tooltip": "The latent to be sampled; only its size counts."}),
                "steps": ("INT", {"default": 20, "min": 1, "max": 1000, "tooltip": steps}),
                "denoise": (
                    "FLOAT",
                    {"default": 1.0, "min": 0.01, "max": 1.0, "step": 0.01, "tooltip": denoise},
                ),
                "shift": (list(SHIFTS), {"default": SHIFTS[0], "tooltip": shift}),
                "mu": (
                    "FLOAT",
                    {"default": FIXED_MU, "min": -10.0, "max": 10.0, "step": 0.01, "tooltip": mu},
                ),
            }
        }

    def run(self, latent, steps, denoise, shift, mu):
        return (make_sigmas(steps, token_count(latent), shift=shift, mu=mu, denoise=denoise),)


NODES = (Schedule,)
