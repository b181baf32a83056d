"""CONDITIONING, IMAGE, VAE -> CONDITIONING with a reference image (flux_core/tools/kontext.py)."""

from __future__ import annotations

from ..flux_core.tools.references import METHODS
from .conditioning_wires import checked_conditioning, with_reference
from .host import current_host
from .widgets import choice, real, wire
from .wires import checked_image

METHOD = "Where the model places references beside the image. offset is FLUX.1 Kontext's own."
STRENGTH = "How much the image attends to this reference: 1 as trained, 0 leaves it out. "
STRENGTH += "A MODEL from another loader ignores it."


class KontextReference:
    """Adds an image for a Kontext model to edit, or to take something from. Chain one node per image."""

    NODE_ID = "RectifluxKontextReference"
    TITLE = "FLUX Kontext Reference"
    CATEGORY = "Rectiflux/image"
    RETURN_TYPES = ("CONDITIONING", "LATENT")
    RETURN_NAMES = ("conditioning", "latent")
    FUNCTION = "run"
    DESCRIPTION = __doc__
    OUTPUT_TOOLTIPS = (
        "The prompt with the image, for FLUX Sampler or another reference.",
        "The image as a latent: its size is the size of the edited image.",
    )
    SEARCH_ALIASES = "kontext, reference latent, edit, image edit, instruct, uso".split(", ")

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "conditioning": wire("CONDITIONING", "The instruction, from FLUX Prompt."),
                "vae": wire("VAE", "FLUX.1's autoencoder."),
                "image": wire("IMAGE", "The image; both sides must be multiples of 16."),
                "method": choice(METHODS, METHOD, default="offset", advanced=True),
                "strength": real(1.0, 0.0, 4.0, 0.05, STRENGTH),
            }
        }

    def run(self, conditioning, vae, image, method, strength):
        checked_conditioning(conditioning, "prompt's")
        raw_latent = current_host().encode(vae, checked_image(image))
        conditioning = with_reference(conditioning, raw_latent, strength, method)
        return conditioning, {"samples": raw_latent}


NODES = (KontextReference,)
