"""Seed -> NOISE. The drawing is flux_core/pipeline.py: draw_noise."""

from __future__ import annotations

from ..flux_core.pipeline import NOISE_CONVENTIONS
from .wires import SeededNoise


class Noise:
    """The noise that the picture emerges from. The same seed gives the same picture, on every machine."""

    NODE_ID = "RectifluxNoise"
    TITLE = "Noise from Seed"
    CATEGORY = "Rectiflux"
    RETURN_TYPES = ("NOISE",)
    RETURN_NAMES = ("noise",)
    OUTPUT_TOOLTIPS = ("The noise, for FLUX Sampler or for ComfyUI's SamplerCustomAdvanced.",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    SEARCH_ALIASES = ["seed", "random noise", "variation"]

    @classmethod
    def INPUT_TYPES(cls):
        tooltip = "The number that the noise is drawn from. Another seed, another picture of the same prompt."
        seed = {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True, "tooltip": tooltip}
        convention = (
            "Whose noise a seed means. comfyui: that of ComfyUI's own nodes. reference: that of Black Forest "
            "Labs' code and of diffusers in bf16, with the seed's generator on the CPU."
        )
        names = {"default": "comfyui", "advanced": True, "tooltip": convention}
        return {
            "required": {"seed": ("INT", seed)},
            "optional": {"convention": (list(NOISE_CONVENTIONS), names)},
        }

    def run(self, seed, convention="comfyui"):
        return (SeededNoise(seed, convention),)


NODES = (Noise,)
