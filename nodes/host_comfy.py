"""ComfyUI's side of _host.py: true MODEL, CLIP and VAE objects around our networks.

Everything of ComfyUI is imported inside the functions, at the time of the call: ComfyUI replaces some of its
classes while it starts. What is relied on, as of ComfyUI 0.33: comfy/supported_models.py Flux and its kin,
comfy/sd.py VAE, comfy/ops.py. Text is in _comfy_text.py, sampling in _comfy_sampling.py.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..flux_core.backends.compile import check
from ..flux_core.backends.quantize import check_fp8, check_int8, quantize_to_fp8, quantize_to_int8
from ..flux_core.memory import limit_of
from ..flux_core.model.spec import FluxSpec
from ..flux_core.pipeline import LATENT_CHANNELS
from ..flux_core.quant.linear import dequantize_layers, weight_count
from ..flux_core.sampling import preview
from ..flux_core.sampling.step_cache import Caching
from ..flux_core.weights import load_autoencoder, load_transformer, read_metadata
from .host_comfy_lora import add_lora
from .host_comfy_network import CACHING, RUNNER, ComfyNetwork, VAEModule
from .host_comfy_quant import BlockRunner, follow, keep_stored
from .host_comfy_sampling import make_sampler, sample
from .host_comfy_text import encode_text, load_text_encoders, progress, t5_length

__all__ = [
    "add_lora",
    "decode",
    "encode",
    "encode_text",
    "load_model",
    "load_text_encoders",
    "load_vae",
    "make_sampler",
    "model_roots",
    "sample",
    "t5_length",
    "with_caching",
    "with_compiling",
]

# Files


def model_roots(folder: str) -> list[Path]:
    """ComfyUI's folders of one kind. Its own lists leave out GGUF files and folders."""
    import folder_paths

    return [Path(root) for root in folder_paths.get_folder_paths(folder)]


# Loading


def load_model(
    path: Path,
    dtype: torch.dtype | None,
    memory_limit: str,
    form: str | None = None,
    disable_dynamic: bool = False,
) -> Any:
    """A ModelPatcher over comfy.model_base.Flux that holds our network, which multiplies in fp8 or int8 where
    that is the `form`. Raises ValueError where it cannot.

    ComfyUI decides how much of it is on the device; with a limit other than auto, no more than that. With
    `disable_dynamic`, by which ComfyUI asks for it, layer by layer as a whole.
    """
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy.ops
    from comfy.patcher_extension import CallbacksMP

    device = management.get_torch_device()
    if form == "int8":
        check_int8(device)
    elif form == "fp8":
        check_fp8(device)
    network = load_transformer(path, dtype, on_progress=progress())
    config = _config_for(network.spec)
    known = config.supported_inference_dtypes
    if dtype is None and (chosen := _dtype_for(network, known, device)) != network.dtype:
        network = load_transformer(path, chosen, on_progress=progress())
    limit = None if memory_limit == "auto" else limit_of(memory_limit, device)
    if form == "fp8":  # on the device that computes, where it is quick, one weight at a time
        quantize_to_fp8(network, device, on_progress=progress(), then=management.unet_offload_device())
    elif form == "int8":
        quantize_to_int8(network, limit, progress())
    dequantize_layers(
        network, network.dtype, "img_in"
    )  # ComfyUI looks up its width, which a control LoRA changes
    stored = keep_stored(network)
    _use_comfy_layers(network, comfy.ops.disable_weight_init)
    config.set_inference_dtype(network.dtype, None)
    model = config.get_model({})
    model.diffusion_model = ComfyNetwork(network)
    if (factors := preview.from_metadata(read_metadata(path))) is not None:
        model.latent_format.latent_rgb_factors = factors.weight.tolist()
        model.latent_format.latent_rgb_factors_bias = factors.bias.tolist()
    management.archive_model_dtypes(model.diffusion_model)
    # the dynamic patcher, ComfyUI's usual one on a GPU, moves parameters one by one, which stored layers lack
    if limit is not None:
        kind = limited(limit)
    elif stored or disable_dynamic:
        kind = comfy.model_patcher.ModelPatcher
    else:
        kind = comfy.model_patcher.CoreModelPatcher
    patcher = kind(model, device, management.unet_offload_device())
    patcher.cached_patcher_init = (load_model, (path, dtype, memory_limit, form))
    follow(patcher)
    patcher.add_callback(CallbacksMP.ON_PRE_RUN, lambda p: p.model.diffusion_model.begin(p))
    patcher.add_callback(CallbacksMP.ON_CLEANUP, lambda p: p.model.diffusion_model.end())
    return patcher


def limited(limit: int) -> Any:
    """A ModelPatcher that never has more than `limit` bytes of weights on the device.

    Layers beyond that stay behind and are copied over when they are used, as ComfyUI does when memory is low.
    """
    import comfy.model_patcher

    class Limited(comfy.model_patcher.ModelPatcher):
        """Its clones are limited, too."""

        def load(
            self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False
        ) -> Any:
            if self.model_size() > limit:
                full_load, lowvram_model_memory = False, min(lowvram_model_memory or limit, limit)
            return super().load(device_to, lowvram_model_memory, force_patch_weights, full_load)

    return Limited


def _config_for(spec: FluxSpec) -> Any:
    """ComfyUI's description of such a network: by it stock samplers shift [dev]'s sigmas, not [schnell]'s."""
    import comfy.supported_models as supported

    parts = ComfyNetwork.patch_size**2
    config = {
        "image_model": "flux",
        "guidance_embed": spec.guidance_embed,
        "in_channels": spec.in_channels // parts,
        "out_channels": spec.out_channels // parts,
        "depth": spec.depth,
        "depth_single_blocks": spec.depth_single,
        "hidden_size": spec.hidden_size,
        "disable_unet_model_creation": True,
    }
    known = (supported.FluxInpaint, supported.Flux, supported.FluxSchnell)
    return next(kind for kind in known if kind.matches(config))(config)


def _dtype_for(network: nn.Module, known: list[torch.dtype], device: torch.device) -> torch.dtype:
    """What ComfyUI would compute a network of this size in; fp32 on a CPU."""
    import comfy.model_management as management

    if management.is_device_cpu(device):
        return torch.float32
    dtype = management.unet_dtype(device, weight_count(network), known, network.dtype)
    return management.unet_manual_cast(dtype, device, known) or dtype


def _use_comfy_layers(network: nn.Module, operations: Any) -> None:
    """Put ComfyUI's linear layers in place of torch's: it can load a model made of these in part."""
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                ours = operations.Linear(
                    layer.in_features, layer.out_features, layer.bias is not None, device="meta"
                )
                ours.weight, ours.bias = layer.weight, layer.bias
                setattr(parent, name, ours)


def with_caching(model: Any, caching: Caching) -> Any:
    """A clone of a MODEL that skips steps. Raises TypeError for a network that is not ours."""
    network = model.model.diffusion_model
    if not isinstance(network, ComfyNetwork):
        raise TypeError(
            "Step Cache needs a MODEL from Load FLUX Model, got one from another loader; connect Load FLUX "
            "Model, or use ComfyUI's EasyCache"
        )
    clone = model.clone()
    clone.model_options["transformer_options"][CACHING] = caching
    return clone


def with_compiling(model: Any) -> Any:
    """A clone of a MODEL whose blocks are compiled. Raises TypeError for a network that is not ours.

    The clone does without ComfyUI's dynamic loading, as ComfyUI's own TorchCompileModel's does.
    """
    if not isinstance(model.model.diffusion_model, ComfyNetwork):
        raise TypeError(
            "Compile FLUX needs a MODEL from Load FLUX Model, got one from another loader; connect Load FLUX "
            "Model, or use ComfyUI's TorchCompileModel"
        )
    check(model.load_device)
    clone = model.clone(disable_dynamic=True)
    clone.model_options["transformer_options"][RUNNER] = BlockRunner()
    return clone


def load_vae(path: Path) -> Any:
    """A comfy.sd.VAE around our autoencoder."""
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy.sd

    class FluxVAE(comfy.sd.VAE):
        """ComfyUI's VAE, with its tiling and memory management, around a network that it did not build."""

        def vae_encode_crop_pixels(self, pixels: Tensor) -> Tensor:
            height, width = (side // 16 * 16 for side in pixels.shape[1:3])
            top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
            return pixels[:, top : top + height, left : left + width, :3]

    root = logging.getLogger()
    root.addFilter(_no_weights_yet)
    try:
        vae = FluxVAE(sd={})
    finally:
        root.removeFilter(_no_weights_yet)
    vae.device = management.vae_device()
    vae.vae_dtype = management.vae_dtype(vae.device, vae.working_dtypes)
    vae.output_device = management.intermediate_device()
    vae.latent_channels = LATENT_CHANNELS
    module = vae.first_stage_model = VAEModule(load_autoencoder(path, vae.vae_dtype, on_progress=progress()))
    management.archive_model_dtypes(module)
    vae.patcher = comfy.model_patcher.CoreModelPatcher(module, vae.device, management.vae_offload_device())
    # the plain patcher, where memory is low, would leave convolutions behind that are not ComfyUI's own
    vae.disable_offload = not vae.patcher.is_dynamic()
    vae.model_size()
    return vae


def _no_weights_yet(record: logging.LogRecord) -> bool:
    """Drop ComfyUI's warning about a VAE without weights: they follow at once."""
    return "No VAE weights detected" not in record.getMessage()


# Running


def check_vae(vae: Any) -> None:
    """Raise TypeError unless the VAE makes FLUX.1's latents."""
    channels = getattr(vae, "latent_channels", LATENT_CHANNELS)
    if channels != LATENT_CHANNELS:
        raise TypeError(
            f"FLUX.1's VAE has {LATENT_CHANNELS} latent channels, got {channels}; connect Load FLUX VAE"
        )


def decode(vae: Any, samples: Tensor) -> Tensor:
    """An IMAGE from raw samples."""
    check_vae(vae)
    return vae.decode(samples)


def encode(vae: Any, image: Tensor) -> Tensor:
    """Raw samples from an IMAGE."""
    check_vae(vae)
    return vae.encode(image)
