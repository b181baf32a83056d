"""A LoRA's file on a MODEL and a CLIP -> both with it attached, and a report (flux_core/lora)."""

from __future__ import annotations

from .host import current_host
from .loader import changed, validated
from .widgets import choice, real, text, wire


class LoraLoader:
    """Adds a LoRA of any trainer's format to a FLUX.1 model, and reports which of its keys match."""

    NODE_ID = "RectifluxLora"
    TITLE = "Load FLUX LoRA"
    CATEGORY = "Rectiflux/loaders"
    RETURN_TYPES = ("MODEL", "CLIP", "STRING")
    RETURN_NAMES = ("model", "clip", "report")
    FUNCTION = "run"
    DESCRIPTION = __doc__
    OUTPUT_TOOLTIPS = (
        "The model with the LoRA. The input model is not changed.",
        "The text encoders with the LoRA, if it has keys for them and they are connected.",
        "How many of the file's keys match, and which do not. For Preview as Text.",
    )
    SEARCH_ALIASES = "lora, lokr, loha, lycoris, dora, load lora, control lora, style".split(", ")

    @classmethod
    def INPUT_TYPES(cls):
        names = current_host().list_models("loras")
        model = (
            "How strongly the model is changed. 0 changes nothing, a negative strength inverts the change."
        )
        clip = "How strongly the text encoders are changed, if the LoRA has keys for them."
        blocks = "Strengths of parts, times strength_model: double_blocks.0-9=0.5, single_blocks=0. "
        blocks += "Empty: 1 everywhere."
        return {
            "required": {
                "model": wire("MODEL", "The FLUX.1 model."),
                "lora_name": choice(names, "A .safetensors file in models/loras."),
                "strength_model": real(1.0, -20.0, 20.0, 0.05, model),
                "strength_clip": real(1.0, -20.0, 20.0, 0.05, clip),
                "blocks": text(blocks, multiline=False),
            },
            "optional": {"clip": wire("CLIP", "The text encoders, for LoRAs that change them too.")},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, lora_name):
        return validated("loras", lora_name=lora_name)

    @classmethod
    def IS_CHANGED(cls, lora_name=None, **_):
        return changed("loras", lora_name)

    def run(self, model, lora_name, strength_model, strength_clip, blocks, clip=None):
        path = current_host().model_path("loras", lora_name)
        return current_host().add_lora(model, clip, path, strength_model, strength_clip, blocks)


NODES = (LoraLoader,)
