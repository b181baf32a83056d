"""Files -> ComfyUI's MODEL: a ModelPatcher around our network.

Everything of ComfyUI is imported inside the functions, at the time of the call: ComfyUI replaces some of its
classes while it starts. What is relied on, as of ComfyUI 0.33: comfy/supported_models.py Flux and its
variants, comfy/model_patcher.py, comfy/ops.py.
"""

from __future__ import annotations

from typing import Any

import torch

from ..flux_core.backends.quantize import check_fp8, check_int8, quantize_to_fp8, quantize_to_int8
from ..flux_core.memory import limit_of
from ..flux_core.model.spec import FluxSpec
from ..flux_core.model.transformer import FluxTransformer
from ..flux_core.quant.linear import dequantize_layers
from ..flux_core.sampling import preview
from ..flux_core.weights import Checkpoint, Part, Source, load_transformer
from ..flux_core.weights.checkpoint import PartWeights
from .host import WEIGHT_DTYPES
from .host_comfy_hooks import scheduling
from .host_comfy_layers import use_comfy_layers
from .host_comfy_network import ComfyNetwork
from .host_comfy_quant import follow_patches, make_patchable
from .host_comfy_text import progress


def load_model(source: Source, weight_dtype: str, memory_limit: str, disable_dynamic: bool = False) -> Any:
    """A ModelPatcher over comfy.model_base.Flux that holds our network.

    With memory_limit "auto" ComfyUI decides how much of it is on the device, otherwise no more than the limit
    is. ComfyUI calls this again with `disable_dynamic` where it needs a patcher of its plain kind.
    """
    import comfy.model_management as management
    import comfy.ops

    device = management.get_torch_device()
    limit = None if memory_limit == "auto" else limit_of(memory_limit, device)
    checkpoint = Checkpoint.open(source)
    network, config = _load_network(checkpoint, weight_dtype, limit, device)
    # ComfyUI reads the width of img_in, which a control LoRA changes
    dequantize_layers(network, network.dtype, "img_in")
    has_stored = make_patchable(network)
    use_comfy_layers(network, comfy.ops.disable_weight_init)
    config.set_inference_dtype(network.dtype, None)
    model = _flux_model(config)
    model.diffusion_model = ComfyNetwork(network)
    if (factors := preview.from_metadata(checkpoint.metadata)) is not None:
        model.latent_format.latent_rgb_factors = factors.weight.tolist()
        model.latent_format.latent_rgb_factors_bias = factors.bias.tolist()
    management.archive_model_dtypes(model.diffusion_model)
    # ComfyUI's dynamic patcher, its usual one on a GPU, moves single parameters, which quantized layers lack
    kind = _patcher_kind(limit, disable_dynamic or has_stored)
    patcher = kind(model, device, management.unet_offload_device())
    patcher.cached_patcher_init = (load_model, (checkpoint.path, weight_dtype, memory_limit))
    _follow_runs(patcher)
    return patcher


def _flux_model(config: Any) -> Any:
    """A comfy.model_base.Flux that hands the strengths of references to our network, too."""
    import comfy.conds
    import comfy.model_base

    class Flux(comfy.model_base.Flux):
        def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
            out = super().extra_conds(**kwargs)
            strengths = kwargs.get("reference_latents_strengths")
            if strengths is not None:
                out["ref_latents_strengths"] = comfy.conds.CONDConstant(tuple(strengths))
            return out

    return Flux(config, model_type=config.get_model({}).model_type)


def _load_network(
    checkpoint: Checkpoint, weight_dtype: str, limit: int | None, device: torch.device
) -> tuple[FluxTransformer, Any]:
    """The network, quantized where the dtype says so, and ComfyUI's configuration of such a network."""
    import comfy.model_management as management

    quantized = weight_dtype in ("int8", "fp8")
    if weight_dtype == "int8":
        check_int8(device)
    elif weight_dtype == "fp8":
        check_fp8(device)
    dtype = None if quantized else WEIGHT_DTYPES[weight_dtype]
    config = _config_for(checkpoint.transformer_spec())
    if dtype is None:
        weights = checkpoint.weights(Part.TRANSFORMER)
        dtype = _dtype_for(weights, config.supported_inference_dtypes, device)
    network = load_transformer(checkpoint, dtype, on_progress=progress())
    if weight_dtype == "fp8":  # on the device, where it is fast, one weight at a time
        quantize_to_fp8(network, device, on_progress=progress(), then=management.unet_offload_device())
    elif weight_dtype == "int8":
        quantize_to_int8(network, limit, progress())
    return network, config


def _patcher_kind(limit: int | None, is_plain: bool) -> Any:
    """The class of ModelPatcher for a limit in bytes, or for the plain or the usual way of loading."""
    import comfy.model_patcher

    if limit is not None:
        return limited(limit)
    plain, usual = comfy.model_patcher.ModelPatcher, comfy.model_patcher.CoreModelPatcher
    return scheduling(plain) if is_plain or usual is plain else usual


def _follow_runs(patcher: Any) -> None:
    """Have the network keep results during a sampling run, and its layers use the patches that are loaded."""
    from comfy.patcher_extension import CallbacksMP

    follow_patches(patcher)
    patcher.add_callback(CallbacksMP.ON_PRE_RUN, lambda p: p.model.diffusion_model.begin(p))
    patcher.add_callback(CallbacksMP.ON_CLEANUP, lambda p: p.model.diffusion_model.end())


def limited(limit: int) -> Any:
    """A class of ModelPatcher that, like its clones, has at most `limit` bytes of weights on the device.

    Layers beyond that are offloaded and copied to the device when they are used, as ComfyUI does when memory
    is low.
    """
    import comfy.model_patcher

    class Limited(scheduling(comfy.model_patcher.ModelPatcher)):
        def load(
            self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False
        ) -> Any:
            if self.model_size() > limit:
                full_load, lowvram_model_memory = False, min(lowvram_model_memory or limit, limit)
            return super().load(device_to, lowvram_model_memory, force_patch_weights, full_load)

    return Limited


def _config_for(spec: FluxSpec) -> Any:
    """ComfyUI's configuration of a network, by which stock samplers shift [dev]'s sigmas, not [schnell]'s."""
    import comfy.supported_models as supported

    patch = ComfyNetwork.patch_size**2
    config = {
        "image_model": "flux",
        "guidance_embed": spec.guidance_embed,
        "in_channels": spec.in_channels // patch,
        "out_channels": spec.out_channels // patch,
        "depth": spec.depth,
        "depth_single_blocks": spec.depth_single,
        "hidden_size": spec.hidden_size,
        "disable_unet_model_creation": True,
    }
    known = (supported.FluxInpaint, supported.Flux, supported.FluxSchnell)
    return next(kind for kind in known if kind.matches(config))(config)


def _dtype_for(weights: PartWeights, known: list[torch.dtype], device: torch.device) -> torch.dtype:
    """The dtype in which ComfyUI computes a network of this size and dtype on a device."""
    import comfy.model_management as management

    dtype = management.unet_dtype(device, weights.parameter_count, known, weights.dtype)
    return management.unet_manual_cast(dtype, device, known) or dtype
