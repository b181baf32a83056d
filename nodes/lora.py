"""A LoRA's file on a MODEL and a CLIP -> both with it attached, and a report, by flux_core/lora."""

from __future__ import annotations

from . import host_embedded as _host


class LoraLoader:
    """Adds a LoRA to a FLUX.1 model, in whatever format its trainer wrote it, and says whether it fits."""

    NODE_ID = "RectifluxLora"
    TITLE = "Load FLUX LoRA"
    CATEGORY = "Rectiflux/loaders"
    RETURN_TYPES = ("MODEL", "CLIP", "STRING")
    RETURN_NAMES = ("model", "clip", "report")
    OUTPUT_TOOLTIPS = (
        "The model with the LoRA. The model that came in stays as it was.",
        "The text encoders with the LoRA, where it changes them and they are connected.",
        "How many of the file's keys fit, and which do not. For Preview as Text.",
    )
    FUNCTION = "run"
    DESCRIPTION = __doc__
    SEARCH_ALIASES = ["lora", "lokr", "loha", "lycoris", "dora", "load lora", "control lora", "style"]

    @classmethod
    def INPUT_TYPES(cls):
        strength = {"default": 1.0, "min": -20.0, "max": 20.0, "step": 0.05}
        model = "How strongly the model is changed. 0 leaves it alone, below 0 turns the change round."
        clip = (
            "How strongly the text encoders are changed, where the LoRA changes them and clip is connected."
        )
        blocks = (
            "Strengths for parts of the model, times strength_model: double_blocks.0-9=0.5, single_blocks=0, "
            "*.img_attn=1. The last one that fits decides. Empty: 1 everywhere."
        )
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The FLUX.1 model."}),
                "lora_name": (
                    _host.list_models("loras"),
                    {"tooltip": "A .safetensors file in models/loras."},
                ),
                "strength_model": ("FLOAT", {**strength, "tooltip": model}),
                "strength_clip": ("FLOAT", {**strength, "tooltip": clip}),
                "blocks": ("STRING", {"default": "", "multiline": False, "tooltip": blocks}),
            },
            "optional": {"clip": ("CLIP", {"tooltip": "The text encoders, for LoRAs that change them too."})},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, lora_name):
        wrong = _host.why_no_model("loras", lora_name)
        return True if wrong is None else f"lora_name: {wrong}"

    def run(self, model, lora_name, strength_model, strength_clip, blocks, clip=None):
        path = _host.model_path("loras", lora_name)
        return _host.add_lora(model, clip, path, strength_model, strength_clip, blocks)


NODES = (LoraLoader,)
