"""Width, height -> LATENT (flux_core/pipeline.py: latent_size)."""

from __future__ import annotations

import torch

from ..flux_core.pipeline import LATENT_CHANNELS, latent_size
from .widgets import integer


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
                "width": integer(1024, 16, 8192, f"Width of the image {side}", step=16),
                "height": integer(1024, 16, 8192, f"Height of the image {side}", step=16),
                "batch_size": integer(1, 1, 64, "How many images to generate at once."),
            }
        }

    def run(self, width, height, batch_size):
        h, w = latent_size(width, height)
        return ({"samples": torch.zeros(batch_size, LATENT_CHANNELS, h, w)},)


NODES = (EmptyLatent,)
