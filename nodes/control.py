"""CONDITIONING with a control image, and how such an image is made (flux_core/tools/control.py)."""

from __future__ import annotations

from ..flux_core.tools.control import canny
from .conditioning_wires import checked_conditioning, with_values
from .host import current_host
from .widgets import real, wire
from .wires import checked_image, from_core_image, to_core_image


class ControlImage:
    """Gives a Canny or Depth model its control image: edges, or a depth map."""

    NODE_ID = "RectifluxControlImage"
    TITLE = "FLUX Control Image"
    CATEGORY = "Rectiflux/image"
    RETURN_TYPES = ("CONDITIONING", "LATENT")
    RETURN_NAMES = ("conditioning", "latent")
    FUNCTION = "run"
    DESCRIPTION = __doc__
    OUTPUT_TOOLTIPS = (
        "The prompt with the control image, for FLUX Sampler's positive input.",
        "An empty latent of the image's size, for the schedule and the sampler.",
    )
    SEARCH_ALIASES = "canny, depth, instruct pix to pix conditioning, control lora, structure".split(", ")

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "conditioning": wire("CONDITIONING", "What the image shows, from FLUX Prompt."),
                "vae": wire("VAE", "FLUX.1's autoencoder."),
                "image": wire("IMAGE", "Edges or depth; both sides must be multiples of 16."),
            }
        }

    def run(self, conditioning, vae, image):
        checked_conditioning(conditioning, "prompt's")
        raw_latent = current_host().encode(vae, checked_image(image))
        controlled = with_values(conditioning, concat_latent_image=raw_latent)
        return controlled, {"samples": raw_latent.new_zeros(raw_latent.shape)}


class CannyEdges:
    """Edges of an image, white on black, for a Canny model or ControlNet."""

    NODE_ID = "RectifluxCanny"
    TITLE = "Canny Edges"
    CATEGORY = "Rectiflux/image"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("edges",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    OUTPUT_TOOLTIPS = ("White edges on black, of the image's size.",)
    SEARCH_ALIASES = "canny, edge, line, outline, preprocessor".split(", ")

    @classmethod
    def INPUT_TYPES(cls):
        low = "Weaker edges are kept where they are connected to strong ones. Lower keeps more."
        high = "Edges above this are kept in any case. It must not be below low."
        return {
            "required": {
                "image": wire("IMAGE", "The image whose edges are found."),
                "low": real(0.1, 0.01, 4.0, 0.01, low),
                "high": real(0.3, 0.01, 4.0, 0.01, high),
            }
        }

    def run(self, image, low, high):
        return (from_core_image(canny(to_core_image(image[..., :3]), low, high)),)


NODES = (ControlImage, CannyEdges)
