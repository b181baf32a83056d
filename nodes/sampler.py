"""MODEL, CONDITIONING, NOISE, SAMPLER, SIGMAS, LATENT -> LATENT and a report, by flux_core/pipeline.py."""

from __future__ import annotations

from . import host_embedded as _host
from .wires import with_samples


class Sampler:
    """Paints: follows the model from noise to a picture, step by step. A preview shows it emerging."""

    NODE_ID = "RectifluxSampler"
    TITLE = "FLUX Sampler"
    CATEGORY = "Rectiflux/sampling"
    RETURN_TYPES = ("LATENT", "STRING")
    RETURN_NAMES = ("latent", "report")
    OUTPUT_TOOLTIPS = (
        "The finished picture as a latent, for FLUX VAE Decode.",
        "What the run was like: model calls, error, straightness, time. For Preview as Text.",
    )
    FUNCTION = "run"
    DESCRIPTION = __doc__
    SEARCH_ALIASES = [
        "ksampler",
        "sample",
        "generate",
        "denoise",
        "sampler custom advanced",
        "cfg",
        "inpaint",
    ]

    @classmethod
    def INPUT_TYPES(cls):
        latent = "What to start from: an empty latent, or a picture's. Its noise mask is honoured."
        cfg = (
            "True classifier-free guidance: how far to go from the negative prompt to the prompt. 1, usual "
            "for [dev] and [schnell], switches it off; else a step takes twice as long. mini-pro: 3.5."
        )
        until = (
            "Down to which sigma cfg_scale counts. Below it a step follows the prompt alone and takes half "
            "the time; what the picture shows is settled by then. 0 guides to the end."
        )
        negative = "What to steer away from; counts only when cfg_scale is not 1."
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The FLUX.1 model."}),
                "positive": ("CONDITIONING", {"tooltip": "What the picture shows."}),
                "noise": ("NOISE", {"tooltip": "The noise to start from."}),
                "sampler": ("SAMPLER", {"tooltip": "How a step is taken."}),
                "sigmas": ("SIGMAS", {"tooltip": "The noise levels to pass through, descending."}),
                "latent": ("LATENT", {"tooltip": latent}),
                "cfg_scale": (
                    "FLOAT",
                    {"default": 1.0, "min": 0.0, "max": 30.0, "step": 0.1, "tooltip": cfg},
                ),
            },
            "optional": {
                "negative": ("CONDITIONING", {"tooltip": negative}),
                "cfg_until": (
                    "FLOAT",
                    {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.05, "tooltip": until},
                ),
            },
        }

    def run(self, model, positive, noise, sampler, sigmas, latent, cfg_scale, negative=None, cfg_until=0.0):
        samples, report = _host.sample(
            model, positive, negative, cfg_scale, noise, latent, sigmas, sampler, cfg_until
        )
        return with_samples(latent, samples), report


NODES = (Sampler,)
