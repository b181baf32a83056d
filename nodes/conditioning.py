"""CLIP, prompt -> CONDITIONING (flux_core/model/text_encoders.py)."""

from __future__ import annotations

from ..flux_core.model.prompts import LITERAL, WEIGHTS
from .host import T5_LENGTHS, current_host
from .widgets import choice, real, text, wire

CLIP = "FLUX.1's text encoders."
WEIGHTS_TOOLTIP = "How (word:1.3) is read: literal takes it as plain text, comfy as ComfyUI's weights."


class TextEncode:
    """Encodes a prompt for the model. Write whole English sentences: FLUX.1 reads them in full."""

    NODE_ID = "RectifluxTextEncode"
    TITLE = "FLUX Prompt"
    CATEGORY = "Rectiflux"
    RETURN_TYPES = ("CONDITIONING",)
    RETURN_NAMES = ("positive",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    OUTPUT_TOOLTIPS = ("The encoded prompt, for a sampler's positive input.",)
    SEARCH_ALIASES = "text, positive prompt, clip text encode, flux guidance, caption".split(", ")

    @classmethod
    def INPUT_TYPES(cls):
        guidance = "How closely [dev] follows the prompt: 3.5 is usual, 1.5 to 2.5 looks more natural. "
        guidance += "Models without guidance, such as [schnell], ignore it."
        clip_prompt = (
            "A separate, short text for CLIP, which sets the overall look. Empty: the prompt itself."
        )
        length = (
            "Number of T5 tokens, padding included. auto uses the connected model's own, prompt does not pad."
        )
        model = "The model that will be sampled, for t5_length auto."
        return {
            "required": {
                "clip": wire("CLIP", CLIP),
                "prompt": text("What the image shows, in English. It may be empty."),
                "guidance": real(3.5, 0.0, 100.0, 0.1, guidance),
            },
            "optional": {
                "clip_prompt": text(clip_prompt, advanced=True),
                "t5_length": choice(T5_LENGTHS, length, default="auto", advanced=True),
                "model": wire("MODEL", model),
                "weights": choice(WEIGHTS, WEIGHTS_TOOLTIP, default=LITERAL, advanced=True),
            },
        }

    def run(self, clip, prompt, guidance, clip_prompt="", t5_length="auto", model=None, weights=LITERAL):
        by_model = t5_length == "auto" and model is not None
        length = current_host().t5_length(model) if by_model else T5_LENGTHS[t5_length]
        texts = prompt, clip_prompt or prompt
        return (current_host().encode_text(clip, *texts, guidance, length, weights),)


class NegativePrompt:
    """Encodes what the image must not show. It is used where the sampler's cfg_scale is not 1."""

    NODE_ID = "RectifluxNegativePrompt"
    TITLE = "FLUX Negative Prompt"
    CATEGORY = "Rectiflux"
    RETURN_TYPES = ("CONDITIONING",)
    RETURN_NAMES = ("negative",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    OUTPUT_TOOLTIPS = ("The encoded text, for a sampler's negative input.",)
    SEARCH_ALIASES = "negative, unconditional, empty prompt, clip text encode".split(", ")

    @classmethod
    def INPUT_TYPES(cls):
        negative = "What to steer away from. Empty, the usual choice, steers away from the average image."
        return {
            "required": {"clip": wire("CLIP", CLIP), "negative_prompt": text(negative)},
            "optional": {"weights": choice(WEIGHTS, WEIGHTS_TOOLTIP, default=LITERAL, advanced=True)},
        }

    def run(self, clip, negative_prompt, weights=LITERAL):
        texts = negative_prompt, negative_prompt
        return (current_host().encode_text(clip, *texts, None, None, weights),)


NODES = (TextEncode, NegativePrompt)
