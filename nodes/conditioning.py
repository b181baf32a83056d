"""CLIP, prompt -> CONDITIONING. The encoding is flux_core/conditioning.py."""

from __future__ import annotations

from . import _host


class TextEncode:
    """Turns a prompt into what the model understands. Write whole sentences: FLUX reads them in full."""

    NODE_ID = "RectifluxTextEncode"
    TITLE = "FLUX Prompt"
    CATEGORY = "Rectiflux"
    RETURN_TYPES = ("CONDITIONING",)
    RETURN_NAMES = ("positive",)
    OUTPUT_TOOLTIPS = ("The encoded prompt, for a sampler's positive input.",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    SEARCH_ALIASES = ["text", "positive prompt", "clip text encode", "flux guidance", "caption"]

    @classmethod
    def INPUT_TYPES(cls):
        prompt = "What the picture shows. An empty prompt is allowed: the model then paints what it likes."
        guidance = (
            "How closely FLUX.1 [dev] follows the prompt; 3.5 is usual, 1.5 to 2.5 looks more natural. "
            "Models without this input, [schnell] and the miniature, ignore it."
        )
        clip_prompt = (
            "A separate, short text for CLIP, which sets the overall look. Empty: the prompt itself."
        )
        return {
            "required": {
                "clip": ("CLIP", {"tooltip": "FLUX.1's text encoders."}),
                "prompt": ("STRING", {"multiline": True, "default": "", "tooltip": prompt}),
                "guidance": (
                    "FLOAT",
                    {"default": 3.5, "min": 0.0, "max": 100.0, "step": 0.1, "tooltip": guidance},
                ),
            },
            "optional": {
                "clip_prompt": (
                    "STRING",
                    {"multiline": True, "default": "", "advanced": True, "tooltip": clip_prompt},
                ),
            },
        }

    def run(self, clip, prompt, guidance, clip_prompt=""):
        return (_host.encode_text(clip, prompt, clip_prompt, guidance),)


class NegativePrompt:
    """Says what the picture must not show. Counts where the sampler's cfg_scale is not 1."""

    NODE_ID = "RectifluxNegativePrompt"
    TITLE = "FLUX Negative Prompt"
    CATEGORY = "Rectiflux"
    RETURN_TYPES = ("CONDITIONING",)
    RETURN_NAMES = ("negative",)
    OUTPUT_TOOLTIPS = ("The encoded text, for a sampler's negative input.",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    SEARCH_ALIASES = ["negative", "unconditional", "empty prompt", "clip text encode"]

    @classmethod
    def INPUT_TYPES(cls):
        tooltip = "What to steer away from. Empty is the usual choice: away from the average picture."
        return {
            "required": {
                "clip": ("CLIP", {"tooltip": "FLUX.1's text encoders."}),
                "negative_prompt": ("STRING", {"multiline": True, "default": "", "tooltip": tooltip}),
            }
        }

    def run(self, clip, negative_prompt):
        return (_host.encode_text(clip, negative_prompt),)


NODES = (TextEncode, NegativePrompt)
