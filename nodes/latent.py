"""Width, height -> LATENT. The sizes are those of flux_core/pipeline.py: latent_size."""

from __future__ import annotations

import torch

from ..flux_core.pipeline import LATENT_CHANNELS, latent_size


class EmptyLatent:
    """An empty canvas of the picture's size, to start from noise. Both sides are multiples of 16."""

    NODE_ID = "RectifluxEmptyLatent"
    TITLE = "Empty FLUX Latent"
    CATEGORY = "Rectiflux"
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("The empty latent, for the schedule (which needs its size) and for the sampler.",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    SEARCH_ALIASES = ["size", "resolution", "width", "height", "empty latent image", "batch"]

    @classmethod
    def INPUT_TYPES(cls):
        side = "in pixels, a multiple of 16. FLUX.1 likes a million pixels in all, the miniature 128 x 128."
        size = {"default": 1024, "min": 16, "max": 8192, "step": 16}
        return {
            "required": {
                "width": ("INT", {**size, "tooltip": f"The picture's width {side}"}),
                "height": ("INT", {**size, "tooltip": f"The picture's height {side}"}),
                "batch_size": (
                    "INT",
                    {"default": 1, "min": 1, "max": 64, "tooltip": "How many pictures to paint at once."},
                ),
            }
        }

    def run(self, width, height, batch_size):
        h, w = latent_size(width, height)
        return ({"samples": torch.zeros(batch_size, LATENT_CHANNELS, h, w)},)


NODES = (EmptyLatent,)
