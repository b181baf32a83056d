"""Width, height -> LATENT (flux_core/pipeline.py: latent_size)."""

from __future__ import annotations

import torch

from ..flux_core.pipeline import LATENT_CHANNELS, latent_size
from .widgets import integer, problem_of

LARGEST_SIDE = 8192


class EmptyLatent:
    """An empty latent of the image's size, to start from noise. Both sides are multiples of 16."""

    NODE_ID = "RectifluxEmptyLatent"
    TITLE = "Empty FLUX Latent"
    CATEGORY = "Rectiflux"
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latent",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    OUTPUT_TOOLTIPS = ("The empty latent, for the schedule (which needs its size) and for the sampler.",)
    SEARCH_ALIASES = "size, resolution, width, height, empty latent image, batch".split(", ")

    @classmethod
    def INPUT_TYPES(cls):
        side = "in pixels, a multiple of 16. FLUX.1 works best at one megapixel, the miniature at 128 x 128."
        return {
            "required": {
                "width": integer(1024, 16, LARGEST_SIDE, f"Width of the image {side}", step=16),
                "height": integer(1024, 16, LARGEST_SIDE, f"Height of the image {side}", step=16),
                "batch_size": integer(1, 1, 64, "How many images to generate at once."),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, width=None, height=None):
        """Before models load, in one sentence of both hosts; a wired side is checked in `run`."""
        if width is None or height is None:
            return True
        return problem_of(latent_size, width, height, LARGEST_SIDE) or True

    def run(self, width, height, batch_size):
        h, w = latent_size(width, height, LARGEST_SIDE)
        return ({"samples": torch.zeros(batch_size, LATENT_CHANNELS, h, w)},)


NODES = (EmptyLatent,)
