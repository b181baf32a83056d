"""Filling a hole in an image: CONDITIONING with the masked image, borders, and the result put back."""

from __future__ import annotations

from ..flux_core.tools import fill
from .conditioning_wires import checked_conditioning, with_values
from .host import current_host
from .widgets import integer, wire
from .wires import (
    channels_first,
    channels_last,
    checked_image,
    from_core_image,
    from_core_mask,
    to_core_image,
    to_core_mask,
)

GRAY = 0.5
"""Value of the borders that are to be filled."""
MASK = "1 (white) where the image is to be filled."


class Fill:
    """Gives a Fill model the image with a hole, and the mask. The model fills the hole by the prompt."""

    NODE_ID = "RectifluxFill"
    TITLE = "FLUX Fill"
    CATEGORY = "Rectiflux/image"
    RETURN_TYPES = ("CONDITIONING", "LATENT")
    RETURN_NAMES = ("conditioning", "latent")
    FUNCTION = "run"
    DESCRIPTION = __doc__
    OUTPUT_TOOLTIPS = (
        "The prompt with the masked image, for FLUX Sampler's positive input.",
        "The image as a latent with its mask, for the schedule and the sampler.",
    )
    SEARCH_ALIASES = "inpaint, outpaint, fill, inpaint model conditioning, mask".split(", ")

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "conditioning": wire("CONDITIONING", "What the whole image shows, from FLUX Prompt."),
                "vae": wire("VAE", "FLUX.1's autoencoder."),
                "image": wire("IMAGE", "The image; both sides must be multiples of 16."),
                "mask": wire("MASK", MASK),
            }
        }

    def run(self, conditioning, vae, image, mask):
        checked_conditioning(conditioning, "prompt's")
        image = checked_image(image)
        core_image, core_mask = to_core_image(image), to_core_mask(mask, image)
        hole = fill.masked_image(core_image, core_mask)
        raw_latent = current_host().encode(vae, from_core_image(hole))
        filled = with_values(conditioning, concat_latent_image=raw_latent, concat_mask=core_mask)
        return filled, {"samples": current_host().encode(vae, image), "noise_mask": core_mask}


class PadForOutpaint:
    """Adds empty borders to an image, and a mask of them, for FLUX Fill to continue it."""

    NODE_ID = "RectifluxPadForOutpaint"
    TITLE = "Pad for Outpaint"
    CATEGORY = "Rectiflux/image"
    RETURN_TYPES = ("IMAGE", "MASK")
    RETURN_NAMES = ("image", "mask")
    FUNCTION = "run"
    DESCRIPTION = __doc__
    OUTPUT_TOOLTIPS = ("The image with gray borders.", "1 in the borders.")
    SEARCH_ALIASES = "outpaint, extend, uncrop, pad image, border".split(", ")

    @classmethod
    def INPUT_TYPES(cls):
        sides = {
            name: integer(0, 0, 4096, f"Pixels to add at the {name}.", step=16)
            for name in ("left", "top", "right", "bottom")
        }
        return {"required": {"image": wire("IMAGE", "The image to continue."), **sides}}

    def run(self, image, left, top, right, bottom):
        padded, mask = fill.outpaint(channels_first(image), left, top, right, bottom, GRAY)
        return channels_last(padded), from_core_mask(mask)


class Composite:
    """Puts a filled area back into the original image. All other pixels stay the original's, unchanged."""

    NODE_ID = "RectifluxComposite"
    TITLE = "Composite Filled Area"
    CATEGORY = "Rectiflux/image"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    OUTPUT_TOOLTIPS = ("The original image with the filled area.",)
    SEARCH_ALIASES = "stitch, paste, image composite masked, blend, inpaint".split(", ")

    @classmethod
    def INPUT_TYPES(cls):
        feather = "Width of the soft seam around the mask, in pixels. Beyond it nothing changes."
        return {
            "required": {
                "original": wire("IMAGE", "The image as it was before."),
                "generated": wire("IMAGE", "The image of the same size that was generated."),
                "mask": wire("MASK", MASK),
                "feather": integer(4, 0, 256, feather),
            }
        }

    def run(self, original, generated, mask, feather):
        core_mask = to_core_mask(mask, original)
        images = (channels_first(image) for image in (original, generated))
        return (channels_last(fill.composite(*images, core_mask, feather)),)


NODES = (Fill, PadForOutpaint, Composite)
