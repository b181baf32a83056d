"""Seed -> NOISE (flux_core/pipeline.py: draw_noise)."""

from __future__ import annotations

from ..flux_core.pipeline import LARGEST_EXACT_SEED, NOISE_CONVENTIONS, check_seed
from .widgets import choice, integer, problem_of
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
            "required": {"seed": integer(0, 0, LARGEST_EXACT_SEED, seed, control_after_generate=True)},
            "optional": {
                "convention": choice(NOISE_CONVENTIONS, convention, default="comfyui", advanced=True)
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, seed=None):
        """Scripts and older files may use any 64-bit seed; the widget's maximum is what a browser keeps."""
        return True if seed is None else problem_of(check_seed, seed) or True

    def run(self, seed, convention="comfyui"):
        check_seed(seed)
        return (SeededNoise(seed, convention),)


NODES = (Noise,)
