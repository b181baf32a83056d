"""Files -> MODEL, CLIP, VAE, and a line that describes them (flux_core/weights)."""

from __future__ import annotations

from ..flux_core.weights import Checkpoint, Part
from .host import MEMORY_LIMITS, WEIGHT_DTYPES, current_host
from .model_files import prefer
from .widgets import choice

ABOUT = "Variant, format, size and parameter count of the file, for Preview as Text."
MODEL = "The model, for FLUX Sampler, or for any sampler or LoRA loader of ComfyUI."
CLIP = "Both encoders as one, for FLUX Prompt or for ComfyUI's own prompt nodes."
VAE = "The autoencoder, for FLUX VAE Decode and Encode or for ComfyUI's own."
DTYPE = (
    "Data type of the weights: auto is the file's own on a GPU, fp32 on a CPU. "
    "int8 (CPU) and fp8 (GPU) quantize them, for half the memory of bf16."
)
LIMIT = (
    "Memory for weights; blocks beyond it are loaded from the file at every step, which is slower. "
    "Lower it when the memory is full."
)


def dtype_and_limit():
    """The two inputs of what loads a transformer; workflows were saved before the second existed."""
    dtype = {"weight_dtype": choice(WEIGHT_DTYPES, DTYPE, default="auto")}
    return dtype, {"memory_limit": choice(MEMORY_LIMITS, LIMIT, default="auto")}


def validated(folder, **names):
    """True, or what is wrong with the first bad file name of a node's inputs: for VALIDATE_INPUTS."""
    errors = {field: current_host().path_error(folder, name) for field, name in names.items()}
    return next((f"{field}: {error}" for field, error in errors.items() if error is not None), True)


def changed(folder, *names):
    """A text that changes when one of the files does, so that it is loaded anew: for IS_CHANGED."""
    return "".join(current_host().file_state(folder, name) for name in names)


class ModelLoader:
    """Loads a FLUX.1 model: [dev], [schnell], a finetune, or the miniature that comes with Rectiflux."""

    NODE_ID = "RectifluxModelLoader"
    TITLE = "Load FLUX Model"
    CATEGORY = "Rectiflux/loaders"
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "about")
    FUNCTION = "run"
    DESCRIPTION = __doc__
    OUTPUT_TOOLTIPS = (MODEL, ABOUT)
    SEARCH_ALIASES = "flux, load diffusion model, unet loader, gguf, fp8, transformer, diffusers".split(", ")

    @classmethod
    def INPUT_TYPES(cls):
        name = "A .safetensors or .gguf file, or a diffusers folder, in models/diffusion_models. "
        name += "Its format is detected from its contents."
        dtype, limit = dtype_and_limit()
        names = current_host().list_models("diffusion_models")
        return {"required": {"model_name": choice(names, name), **dtype}, "optional": limit}

    @classmethod
    def VALIDATE_INPUTS(cls, model_name):
        return validated("diffusion_models", model_name=model_name)

    @classmethod
    def IS_CHANGED(cls, model_name=None, **_):
        return changed("diffusion_models", model_name)

    def run(self, model_name, weight_dtype, memory_limit="auto"):
        checkpoint = Checkpoint.open(current_host().model_path("diffusion_models", model_name))
        return current_host().load_model(checkpoint, weight_dtype, memory_limit), checkpoint.describe()


class TextEncoderLoader:
    """Loads FLUX.1's two text encoders: CLIP-L, which gives one vector, and T5, which gives one per token."""

    NODE_ID = "RectifluxTextEncoderLoader"
    TITLE = "Load FLUX Text Encoders"
    CATEGORY = "Rectiflux/loaders"
    RETURN_TYPES = ("CLIP", "STRING")
    RETURN_NAMES = ("clip", "about")
    FUNCTION = "run"
    DESCRIPTION = __doc__
    OUTPUT_TOOLTIPS = (CLIP, "A line on each of the two files, for Preview as Text.")
    SEARCH_ALIASES = "flux, dual clip loader, t5, t5xxl, clip_l, load clip, text encoder, gguf".split(", ")

    @classmethod
    def INPUT_TYPES(cls):
        names = current_host().list_models("text_encoders")
        clip = "CLIP-L's file or folder in models/text_encoders, such as clip_l.safetensors."
        t5 = "T5's file or folder in models/text_encoders, such as t5xxl_fp16.safetensors. "
        t5 += "It must belong to the same model."
        return {
            "required": {
                "clip_name": choice(names, clip, default=prefer(names, "clip")),
                "t5_name": choice(names, t5, default=prefer(names, "t5")),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, clip_name, t5_name):
        return validated("text_encoders", clip_name=clip_name, t5_name=t5_name)

    @classmethod
    def IS_CHANGED(cls, clip_name=None, t5_name=None, **_):
        return changed("text_encoders", clip_name, t5_name)

    def run(self, clip_name, t5_name):
        clip, t5 = (
            Checkpoint.open(current_host().model_path("text_encoders", name)) for name in (clip_name, t5_name)
        )
        about = f"{clip.describe(Part.CLIP)}\n{t5.describe(Part.T5)}"
        return current_host().load_text_encoders(clip, t5), about


class VAELoader:
    """Loads FLUX.1's autoencoder, which decodes latents to images and encodes images to latents."""

    NODE_ID = "RectifluxVAELoader"
    TITLE = "Load FLUX VAE"
    CATEGORY = "Rectiflux/loaders"
    RETURN_TYPES = ("VAE", "STRING")
    RETURN_NAMES = ("vae", "about")
    FUNCTION = "run"
    DESCRIPTION = __doc__
    OUTPUT_TOOLTIPS = (VAE, ABOUT)
    SEARCH_ALIASES = "flux, ae, autoencoder, load vae, decoder, diffusers".split(", ")

    @classmethod
    def INPUT_TYPES(cls):
        name = "The autoencoder's file or folder in models/vae, such as ae.safetensors."
        return {"required": {"vae_name": choice(current_host().list_models("vae"), name)}}

    @classmethod
    def VALIDATE_INPUTS(cls, vae_name):
        return validated("vae", vae_name=vae_name)

    @classmethod
    def IS_CHANGED(cls, vae_name=None, **_):
        return changed("vae", vae_name)

    def run(self, vae_name):
        checkpoint = Checkpoint.open(current_host().model_path("vae", vae_name))
        return current_host().load_vae(checkpoint), checkpoint.describe(Part.VAE)


class CheckpointLoader:
    """Loads FLUX.1's model, text encoders and VAE out of one file or out of a pipeline's folder."""

    NODE_ID = "RectifluxCheckpointLoader"
    TITLE = "Load FLUX Checkpoint"
    CATEGORY = "Rectiflux/loaders"
    RETURN_TYPES = ("MODEL", "CLIP", "VAE", "STRING")
    RETURN_NAMES = ("model", "clip", "vae", "about")
    FUNCTION = "run"
    DESCRIPTION = __doc__
    OUTPUT_TOOLTIPS = (MODEL, CLIP, VAE, ABOUT)
    SEARCH_ALIASES = "flux, load checkpoint, checkpoint loader simple, all in one, diffusers pipeline".split(
        ", "
    )

    @classmethod
    def INPUT_TYPES(cls):
        name = "An all-in-one .safetensors file or a diffusers pipeline's folder. "
        name += "It is in models/checkpoints or models/diffusion_models."
        dtype, limit = dtype_and_limit()
        names = current_host().list_models("checkpoints")
        return {"required": {"checkpoint_name": choice(names, name), **dtype}, "optional": limit}

    @classmethod
    def VALIDATE_INPUTS(cls, checkpoint_name):
        return validated("checkpoints", checkpoint_name=checkpoint_name)

    @classmethod
    def IS_CHANGED(cls, checkpoint_name=None, **_):
        return changed("checkpoints", checkpoint_name)

    def run(self, checkpoint_name, weight_dtype, memory_limit="auto"):
        checkpoint = Checkpoint.open(current_host().model_path("checkpoints", checkpoint_name))
        loaded = current_host().load_checkpoint(checkpoint, weight_dtype, memory_limit)
        return (*loaded, checkpoint.describe())


NODES = (ModelLoader, TextEncoderLoader, VAELoader, CheckpointLoader)
