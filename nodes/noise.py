"""Seed -> NOISE (flux_core/pipeline.py: draw_noise)."""

from __future__ import annotations

from ..flux_core.pipeline import NOISE_CONVENTIONS
from .widgets import choice, integer
from .wires import SeededNoise


class Noise:
    """The noise that an image is generated from. The same seed gives the same image, on every machine."""

    NODE_ID = "RectifluxNoise"
    TITLE = "Noise from Seed"
    CATEGORY = "Rectiflux"
    RETURN_TYPES = ("NOISE",)
    RETURN_NAMES = ("noise",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    OUTPUT_TOOLTIPS = ("The noise, for FLUX Sampler or for ComfyUI's SamplerCustomAdvanced.",)
    SEARCH_ALIASES = "seed, random noise, variation".split(", ")

    @classmethod
    def INPUT_TYPES(cls):
        seed = "Seed of the random noise. Another seed gives another image of the same prompt."
        convention = "comfyui: the noise of ComfyUI's own nodes. "
        convention += "reference: that of Black Forest Labs' code and of diffusers in bf16."
        return {
            "required": {"seed": integer(0, 0, 2**64 - 1, seed, control_after_generate=True)},
            "optional": {
                "convention": choice(NOISE_CONVENTIONS, convention, default="comfyui", advanced=True)
            },
        }

    def run(self, seed, convention="comfyui"):
        return (SeededNoise(seed, convention),)


NODES = (Noise,)
