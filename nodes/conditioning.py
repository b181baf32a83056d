"""CLIP, prompt -> CONDITIONING. The encoding is flux_core/model/text_encoders.py."""

from __future__ import annotations

from . import host_embedded as _host


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
            "Models without this input, [schnell] and undistilled ones, ignore it."
        )
        clip_prompt = (
            "A separate, short text for CLIP, which sets the overall look. Empty: the prompt itself."
        )
        t5_length = (
            "T5's tokens, which padding fills up; the model reads the padding too. auto: what the connected "
            "model is used with (512 for [dev], 256 for [schnell], 128 for Fill), or else the text encoders' "
            "own number. prompt: only the prompt's own tokens, which gives short prompts more weight."
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
                "t5_length": (
                    list(_host.T5_LENGTHS),
                    {"default": "auto", "advanced": True, "tooltip": t5_length},
                ),
                "model": ("MODEL", {"tooltip": "The model that will paint, for t5_length auto."}),
            },
        }

    def run(self, clip, prompt, guidance, clip_prompt="", t5_length="auto", model=None):
        length = _host.t5_length(t5_length, model)
        return (_host.encode_text(clip, prompt, clip_prompt, guidance, length),)


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
