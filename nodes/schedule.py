"""LATENT, steps -> SIGMAS (flux_core/sampling/schedule.py)."""

from __future__ import annotations

from ..flux_core.sampling.schedule import FIXED_MU, SHIFTS, make_sigmas
from .widgets import choice, integer, real, wire
from .wires import token_count


class Schedule:
    """The noise levels of the steps from noise to image, and how they are spaced."""

    NODE_ID = "RectifluxSchedule"
    TITLE = "Rectified-Flow Schedule"
    CATEGORY = "Rectiflux/sampling"
    RETURN_TYPES = ("SIGMAS",)
    RETURN_NAMES = ("sigmas",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    OUTPUT_TOOLTIPS = ("Noise levels from 1 (noise) down to 0 (image), one more than there are steps.",)
    SEARCH_ALIASES = "steps, sigmas, scheduler, denoise, flux shift, basic scheduler".split(", ")

    @classmethod
    def INPUT_TYPES(cls):
        steps = "More steps give finer images and take longer: [dev] 20 to 28, [schnell] 4, the miniature 20."
        denoise = "1 starts from pure noise. Below 1 keeps some of the latent: 0.3 retouches, 0.8 redraws."
        shift = "by size (as [dev] expects) spends more steps near noise for larger images. "
        shift += "none (as [schnell] expects) spaces them evenly, fixed uses mu."
        mu = "The shift exponent when shift is fixed; 1.15 is that of 1024 x 1024 pixels."
        return {
            "required": {
                "latent": wire("LATENT", "The latent to be sampled; only its size is used."),
                "steps": integer(20, 1, 1000, steps),
                "denoise": real(1.0, 0.01, 1.0, 0.01, denoise),
                "shift": choice(SHIFTS, shift, default=SHIFTS[0]),
                "mu": real(FIXED_MU, -10.0, 10.0, 0.01, mu),
            }
        }

    def run(self, latent, steps, denoise, shift, mu):
        return (make_sigmas(steps, token_count(latent), shift=shift, mu=mu, denoise=denoise),)


NODES = (Schedule,)
