"""Files -> MODEL, CLIP, VAE, and a line on what they are. The reading is flux_core/weights."""

from __future__ import annotations

from ..flux_core.memory import LIMITS
from ..flux_core.weights import describe
from . import host_embedded as _host
from .model_files import prefer

ABOUT = "What the file is: kind of model, format, size, parameters. For Preview as Text."
MODEL = "The model, for FLUX Sampler, or for any sampler or LoRA loader of ComfyUI."
CLIP = "Both encoders as one, for FLUX Prompt or for ComfyUI's own prompt nodes."
VAE = "The autoencoder, for FLUX VAE Decode and Encode or for ComfyUI's own."
DTYPE = (
    "Number format of the weights. auto: the file's own on a graphics card, fp32 on a CPU. bf16 and fp16 "
    "take half the memory of fp32. int8, on a CPU, takes half of that and is faster than bf16, with errors "
    "of a hundredth. fp8 takes as little, and is faster on cards that multiply it (GeForce RTX 40, H100 and "
    "later), with errors of some hundredths. Quantised weights stay as they are, and are computed in this "
    "format."
)
LIMIT = (
    "How much of the model stays in memory (on the graphics card, where there is one). Of a larger model "
    "some blocks stay in the file, and come in just ahead of use: slower, but it runs. auto: what is free, "
    "less room for the picture; under ComfyUI its own memory management. Lower it when the memory is full."
)
LIMIT_WIDGET = {"memory_limit": (list(LIMITS), {"default": "auto", "tooltip": LIMIT})}


class ModelLoader:
    """Loads a FLUX.1 model: [dev], [schnell], a finetune, or the miniature that comes with Rectiflux."""

    NODE_ID = "RectifluxModelLoader"
    TITLE = "Load FLUX Model"
    CATEGORY = "Rectiflux/loaders"
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "about")
    OUTPUT_TOOLTIPS = (MODEL, ABOUT)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    SEARCH_ALIASES = [
        "flux",
        "load diffusion model",
        "unet loader",
        "gguf",
        "fp8",
        "transformer",
        "diffusers",
    ]

    @classmethod
    def INPUT_TYPES(cls):
        tooltip = (
            "A .safetensors or .gguf file, or a folder as diffusers has it, in models/diffusion_models. Its "
            "format and sizes are read from it."
        )
        return {
            "required": {
                "model_name": (_host.list_models("diffusion_models"), {"tooltip": tooltip}),
                "weight_dtype": (list(_host.WEIGHT_DTYPES), {"default": "auto", "tooltip": DTYPE}),
            },
            "optional": LIMIT_WIDGET,  # workflows were saved before it was there
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model_name):
        wrong = _host.why_no_model("diffusion_models", model_name)
        return True if wrong is None else f"model_name: {wrong}"

    def run(self, model_name, weight_dtype, memory_limit="auto"):
        path = _host.model_path("diffusion_models", model_name)
        return _host.load_model(path, weight_dtype, memory_limit), describe(path)


class TextEncoderLoader:
    """Loads FLUX.1's two text encoders: CLIP-L, which sums a prompt up, and T5, which reads every word."""

    NODE_ID = "RectifluxTextEncoderLoader"
    TITLE = "Load FLUX Text Encoders"
    CATEGORY = "Rectiflux/loaders"
    RETURN_TYPES = ("CLIP", "STRING")
    RETURN_NAMES = ("clip", "about")
    OUTPUT_TOOLTIPS = (CLIP, "What the two files are, a line for each. For Preview as Text.")
    FUNCTION = "run"
    DESCRIPTION = __doc__
    SEARCH_ALIASES = [
        "flux",
        "dual clip loader",
        "t5",
        "t5xxl",
        "clip_l",
        "load clip",
        "text encoder",
        "gguf",
    ]

    @classmethod
    def INPUT_TYPES(cls):
        names = _host.list_models("text_encoders")
        clip = "CLIP-L's file or folder in models/text_encoders (clip_l.safetensors)."
        t5 = (
            "T5's file or folder in models/text_encoders (t5xxl_fp16.safetensors, or a .gguf file). It must "
            "belong to the same model."
        )
        return {
            "required": {
                "clip_name": (names, {"default": prefer(names, "clip"), "tooltip": clip}),
                "t5_name": (names, {"default": prefer(names, "t5"), "tooltip": t5}),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, clip_name, t5_name):
        wrongs = {name: _host.why_no_model("text_encoders", name) for name in (clip_name, t5_name)}
        wrong = wrongs[clip_name] or wrongs[t5_name]
        return wrong is None or f"{'clip_name' if wrongs[clip_name] else 't5_name'}: {wrong}"

    def run(self, clip_name, t5_name):
        clip_path = _host.model_path("text_encoders", clip_name)
        t5_path = _host.model_path("text_encoders", t5_name)
        about = f"{describe(clip_path, 'clip')}\n{describe(t5_path, 't5')}"
        return _host.load_text_encoders(clip_path, t5_path), about


class VAELoader:
    """Loads FLUX.1's autoencoder, which turns latents into pictures and pictures into latents."""

    NODE_ID = "RectifluxVAELoader"
    TITLE = "Load FLUX VAE"
    CATEGORY = "Rectiflux/loaders"
    RETURN_TYPES = ("VAE", "STRING")
    RETURN_NAMES = ("vae", "about")
    OUTPUT_TOOLTIPS = (VAE, ABOUT)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    SEARCH_ALIASES = ["flux", "ae", "autoencoder", "load vae", "decoder", "diffusers"]

    @classmethod
    def INPUT_TYPES(cls):
        tooltip = "The autoencoder's file or folder in models/vae (ae.safetensors)."
        return {"required": {"vae_name": (_host.list_models("vae"), {"tooltip": tooltip})}}

    @classmethod
    def VALIDATE_INPUTS(cls, vae_name):
        wrong = _host.why_no_model("vae", vae_name)
        return True if wrong is None else f"vae_name: {wrong}"

    def run(self, vae_name):
        path = _host.model_path("vae", vae_name)
        return _host.load_vae(path), describe(path, "vae")


class CheckpointLoader:
    """Loads FLUX.1's model, text encoders and VAE out of one file, or out of a pipeline's folder."""

    NODE_ID = "RectifluxCheckpointLoader"
    TITLE = "Load FLUX Checkpoint"
    CATEGORY = "Rectiflux/loaders"
    RETURN_TYPES = ("MODEL", "CLIP", "VAE", "STRING")
    RETURN_NAMES = ("model", "clip", "vae", "about")
    OUTPUT_TOOLTIPS = (MODEL, CLIP, VAE, ABOUT)
    FUNCTION = "run"
    DESCRIPTION = __doc__
    SEARCH_ALIASES = [
        "flux",
        "load checkpoint",
        "checkpoint loader simple",
        "all in one",
        "diffusers pipeline",
    ]

    @classmethod
    def INPUT_TYPES(cls):
        tooltip = (
            "An all-in-one .safetensors file, or a whole pipeline's folder as diffusers has it, in "
            "models/checkpoints or models/diffusion_models."
        )
        return {
            "required": {
                "checkpoint_name": (_host.list_models("checkpoints"), {"tooltip": tooltip}),
                "weight_dtype": (list(_host.WEIGHT_DTYPES), {"default": "auto", "tooltip": DTYPE}),
            },
            "optional": LIMIT_WIDGET,
        }

    @classmethod
    def VALIDATE_INPUTS(cls, checkpoint_name):
        wrong = _host.why_no_model("checkpoints", checkpoint_name)
        return True if wrong is None else f"checkpoint_name: {wrong}"

    def run(self, checkpoint_name, weight_dtype, memory_limit="auto"):
        path = _host.model_path("checkpoints", checkpoint_name)
        return (*_host.load_checkpoint(path, weight_dtype, memory_limit), describe(path))


NODES = (ModelLoader, TextEncoderLoader, VAELoader, CheckpointLoader)
