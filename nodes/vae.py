"""LATENT -> IMAGE and back. The network is flux_core/model/autoencoder.py."""

from __future__ import annotations

from . import host_embedded as _host
from .wires import checked_image, raw_samples


class VAEDecode:
    """Turns a latent into the picture."""

    NODE_ID = "RectifluxVAEDecode"
    TITLE = "FLUX VAE Decode"
    CATEGORY = "Rectiflux"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)
    OUTPUT_TOOLTIPS = ("The pictures, to save or to look at.",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    SEARCH_ALIASES = ["decode", "latent to image", "vae decode"]

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "samples": ("LATENT", {"tooltip": "The latent to decode."}),
                "vae": ("VAE", {"tooltip": "FLUX.1's autoencoder; the miniature has one of its own."}),
            }
        }

    def run(self, samples, vae):
        return (_host.decode(vae, raw_samples(samples)),)


class VAEEncode:
    """Turns a picture into a latent, to start from it instead of from an empty one. Set denoise below 1."""

    NODE_ID = "RectifluxVAEEncode"
    TITLE = "FLUX VAE Encode"
    CATEGORY = "Rectiflux"
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("The picture as a latent, for the schedule and the sampler.",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    SEARCH_ALIASES = ["encode", "image to latent", "img2img", "image to image", "vae encode"]

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "image": ("IMAGE", {"tooltip": "The picture; both sides must be multiples of 16."}),
                "vae": ("VAE", {"tooltip": "FLUX.1's autoencoder; the miniature has one of its own."}),
            }
        }

    def run(self, image, vae):
        return ({"samples": _host.encode(vae, checked_image(image))},)


NODES = (VAEDecode, VAEEncode)
