"""MODEL, CONDITIONING, NOISE, SAMPLER, SIGMAS, LATENT -> LATENT and a report (flux_core/pipeline.py)."""

from __future__ import annotations

from .host import current_host
from .run_report import NOTHING_SAMPLED
from .widgets import real, wire
from .wires import SamplerInputs, with_raw_latent


class Sampler:
    """Generates an image: integrates the model's velocity from noise, step by step, with a preview."""

    NODE_ID = "RectifluxSampler"
    TITLE = "FLUX Sampler"
    CATEGORY = "Rectiflux/sampling"
    RETURN_TYPES = ("LATENT", "STRING")
    RETURN_NAMES = ("latent", "report")
    FUNCTION = "run"
    DESCRIPTION = __doc__
    OUTPUT_TOOLTIPS = (
        "The finished image as a latent, for FLUX VAE Decode.",
        "Model calls, error, straightness and time of the run. For Preview as Text.",
    )
    SEARCH_ALIASES = "ksampler, sample, generate, denoise, sampler custom advanced, cfg, inpaint".split(", ")

    @classmethod
    def INPUT_TYPES(cls):
        cfg = "Classifier-free guidance, from the negative prompt to the prompt. "
        cfg += "1, usual for [dev] and [schnell], switches it off and halves the time."
        until = (
            "The sigma down to which cfg_scale is used; later steps take half the time. 0 uses it to the end."
        )
        negative = "What to steer away from; it is used when cfg_scale is not 1."
        return {
            "required": {
                "model": wire("MODEL", "The FLUX.1 model."),
                "positive": wire("CONDITIONING", "What the image shows."),
                "noise": wire("NOISE", "The noise to start from."),
                "sampler": wire("SAMPLER", "The solver that takes the steps."),
                "sigmas": wire("SIGMAS", "The noise levels of the steps, descending."),
                "latent": wire(
                    "LATENT", "What to start from: an empty latent, or an image's, with its noise mask."
                ),
                "cfg_scale": real(1.0, 0.0, 30.0, 0.1, cfg),
            },
            "optional": {
                "negative": wire("CONDITIONING", negative),
                "cfg_until": real(0.0, 0.0, 1.0, 0.05, until),
            },
        }

    def run(self, model, positive, noise, sampler, sigmas, latent, cfg_scale, negative=None, cfg_until=0.0):
        inputs = SamplerInputs(
            model, positive, negative, cfg_scale, cfg_until, noise, sampler, sigmas, latent
        )
        if inputs.steps == 0:
            return with_raw_latent(latent, inputs.raw_latent), NOTHING_SAMPLED
        raw_latent, report = current_host().sample(inputs)
        return with_raw_latent(latent, raw_latent), report


NODES = (Sampler,)
