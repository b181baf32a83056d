"""Files -> MODEL, CLIP, VAE. The reading is flux_core/weights."""

from __future__ import annotations

from . import _host


class ModelLoader:
    """Loads a FLUX.1 model: [dev], [schnell], a finetune, or the miniature that comes with Rectiflux."""

    NODE_ID = "RectifluxModelLoader"
    TITLE = "Load FLUX Model"
    CATEGORY = "Rectiflux/loaders"
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model, for FLUX Sampler, or for any sampler or LoRA loader of ComfyUI.",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    SEARCH_ALIASES = ["flux", "load diffusion model", "unet loader", "checkpoint", "transformer"]

    @classmethod
    def INPUT_TYPES(cls):
        tooltip = "A .safetensors file in models/diffusion_models. Its sizes are read from the file."
        dtypes = (
            "Number format of the weights. auto: the file's own on a graphics card, fp32 on a CPU. "
            "bf16 and fp16 take half the memory of fp32."
        )
        return {
            "required": {
                "model_name": (_host.list_models("diffusion_models"), {"tooltip": tooltip}),
                "weight_dtype": (list(_host.WEIGHT_DTYPES), {"default": "auto", "tooltip": dtypes}),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model_name):
        wrong = _host.why_no_model("diffusion_models", model_name)
        return True if wrong is None else f"model_name: {wrong}"

    def run(self, model_name, weight_dtype):
        path = _host.model_path("diffusion_models", model_name)
        return (_host.load_model(path, weight_dtype),)


class TextEncoderLoader:
    """Loads FLUX.1's two text encoders: CLIP-L, which sums a prompt up, and T5, which reads every word."""

    NODE_ID = "RectifluxTextEncoderLoader"
    TITLE = "Load FLUX Text Encoders"
    CATEGORY = "Rectiflux/loaders"
    RETURN_TYPES = ("CLIP",)
    RETURN_NAMES = ("clip",)
    OUTPUT_TOOLTIPS = ("Both encoders as one, for FLUX Prompt or for ComfyUI's own prompt nodes.",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    SEARCH_ALIASES = ["flux", "dual clip loader", "t5", "t5xxl", "clip_l", "load clip", "text encoder"]

    @classmethod
    def INPUT_TYPES(cls):
        names = _host.list_models("text_encoders")
        clip = "The CLIP-L file in models/text_encoders (clip_l.safetensors)."
        t5 = "The T5 file in models/text_encoders (t5xxl_fp16.safetensors). It must belong to the same model."
        return {
            "required": {
                "clip_name": (names, {"default": _host.prefer(names, "clip"), "tooltip": clip}),
                "t5_name": (names, {"default": _host.prefer(names, "t5"), "tooltip": t5}),
            }
        }

    def run(self, clip_name, t5_name):
        clip_path = _host.model_path("text_encoders", clip_name)
        t5_path = _host.model_path("text_encoders", t5_name)
        return (_host.load_text_encoders(clip_path, t5_path),)


class VAELoader:
    """Loads FLUX.1's autoencoder, which turns latents into pictures and pictures into latents."""

    NODE_ID = "RectifluxVAELoader"
    TITLE = "Load FLUX VAE"
    CATEGORY = "Rectiflux/loaders"
    RETURN_TYPES = ("VAE",)
    RETURN_NAMES = ("vae",)
    OUTPUT_TOOLTIPS = ("The autoencoder, for FLUX VAE Decode and Encode or for ComfyUI's own.",)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    SEARCH_ALIASES = ["flux", "ae", "autoencoder", "load vae", "decoder"]

    @classmethod
    def INPUT_TYPES(cls):
        tooltip = "The autoencoder's file in models/vae (ae.safetensors)."
        return {"required": {"vae_name": (_host.list_models("vae"), {"tooltip": tooltip})}}

    def run(self, vae_name):
        return (_host.load_vae(_host.model_path("vae", vae_name)),)


NODES = (ModelLoader, TextEncoderLoader, VAELoader)
