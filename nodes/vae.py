"""LATENT -> IMAGE and back (flux_core/model/autoencoder.py)."""

from __future__ import annotations

from .host import current_host
from .widgets import wire
from .wires import checked_image, raw_latent_of

VAE = "FLUX.1's autoencoder; the miniature has its own."


class VAEDecode:
    """Decodes a latent to the image."""

    NODE_ID = "RectifluxVAEDecode"
    TITLE = "FLUX VAE Decode"
    CATEGORY = "Rectiflux"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    OUTPUT_TOOLTIPS = ("The images, to save or to preview.",)
    SEARCH_ALIASES = "decode, latent to image, vae decode".split(", ")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": wire("LATENT", "The latent to decode."), "vae": wire("VAE", VAE)}}

    def run(self, samples, vae):
        return (current_host().decode(vae, raw_latent_of(samples)),)


class VAEEncode:
    """Encodes an image to a latent, to start from it instead of an empty one. Set denoise below 1."""

    NODE_ID = "RectifluxVAEEncode"
    TITLE = "FLUX VAE Encode"
    CATEGORY = "Rectiflux"
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latent",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    OUTPUT_TOOLTIPS = ("The image as a latent, for the schedule and the sampler.",)
    SEARCH_ALIASES = "encode, image to latent, img2img, image to image, vae encode".split(", ")

    @classmethod
    def INPUT_TYPES(cls):
        image = wire("IMAGE", "The image; both sides must be multiples of 16.")
        return {"required": {"image": image, "vae": wire("VAE", VAE)}}

    def run(self, image, vae):
        return ({"samples": current_host().encode(vae, checked_image(image))},)


NODES = (VAEDecode, VAEEncode)
