"""ComfyUI's side of _host.py: true MODEL, CLIP and VAE objects around our networks.

Everything of ComfyUI is imported inside the functions, at the time of the call: ComfyUI replaces some of its
classes while it starts. What is relied on, as of ComfyUI 0.33: comfy/supported_models.py Flux and its kin,
comfy/sd.py CLIP and VAE, comfy/ops.py. Sampling is in _comfy_sampling.py.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..flux_core import preview
from ..flux_core.pipeline import LATENT_CHANNELS
from ..flux_core.spec import FLUX_SCHNELL, FluxSpec
from ..flux_core.stored import make_dense
from ..flux_core.weights import load_autoencoder, load_transformer, read_metadata, read_state_dict
from ..flux_core.weights import load_text_encoders as core_load_text_encoders
from ..flux_core.weights.kinds import CLIP, T5, expect
from . import _wires
from ._comfy_lora import add_lora
from ._comfy_modules import ComfyNetwork, PromptTokens, TextModule, VAEModule
from ._comfy_sampling import make_sampler, sample

__all__ = [
    "add_lora",
    "decode",
    "encode",
    "encode_text",
    "list_models",
    "load_model",
    "load_text_encoders",
    "load_vae",
    "make_sampler",
    "model_path",
    "sample",
    "t5_length",
]

T5_PAD, T5_END = 0, 1
"""T5's ids for padding and for the end of a text."""

# Files


def list_models(folder: str) -> list[str]:
    """Names of the .safetensors files in ComfyUI's folders of that kind."""
    import folder_paths

    return [name for name in folder_paths.get_filename_list(folder) if name.lower().endswith(".safetensors")]


def model_path(folder: str, name: str) -> Path | None:
    """The file of that name in ComfyUI's folders, or None."""
    import folder_paths

    found = folder_paths.get_full_path(folder, name)
    return None if found is None else Path(found)


# Loading


def load_model(path: Path, dtype: torch.dtype | None) -> Any:
    """A ModelPatcher over comfy.model_base.Flux that holds our network."""
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy.ops
    from comfy.patcher_extension import CallbacksMP

    device = management.get_torch_device()
    network = load_transformer(path, dtype)
    make_dense(network, network.dtype)  # stock LoRA loaders patch weights, which they must find
    config = _config_for(network.spec)
    known = config.supported_inference_dtypes
    if dtype is None and (chosen := _dtype_for(network, known, device)) != network.dtype:
        network = network.to(chosen)
    _use_comfy_layers(network, comfy.ops.disable_weight_init)
    config.set_inference_dtype(network.dtype, None)
    model = config.get_model({})
    model.diffusion_model = ComfyNetwork(network)
    if (factors := preview.from_metadata(read_metadata(path))) is not None:
        model.latent_format.latent_rgb_factors = factors.weight.tolist()
        model.latent_format.latent_rgb_factors_bias = factors.bias.tolist()
    management.archive_model_dtypes(model.diffusion_model)
    patcher = comfy.model_patcher.CoreModelPatcher(model, device, management.unet_offload_device())
    patcher.add_callback(CallbacksMP.ON_PRE_RUN, lambda p: p.model.diffusion_model.begin(p))
    patcher.add_callback(CallbacksMP.ON_CLEANUP, lambda p: p.model.diffusion_model.end())
    return patcher


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
    size = sum(parameter.numel() for parameter in network.parameters())
    dtype = management.unet_dtype(device, size, known, network.dtype)
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


def load_text_encoders(clip_path: Path, t5_path: Path) -> Any:
    """A comfy.sd.CLIP around our text encoders; ComfyUI's own where the files come without tokenizers."""
    import comfy.model_management as management
    import comfy.sd
    import folder_paths

    if not all(path.with_suffix(".tokenizer.json").is_file() for path in (clip_path, t5_path)):
        for path, kind in ((clip_path, CLIP), (t5_path, T5)):
            expect(read_state_dict(path), kind, path.name)
        paths, embeddings = [str(clip_path), str(t5_path)], folder_paths.get_folder_paths("embeddings")
        return comfy.sd.load_clip(paths, embedding_directory=embeddings, clip_type=comfy.sd.CLIPType.FLUX)

    def module(device: torch.device, dtype: torch.dtype, model_options: dict[str, Any]) -> TextModule:
        if management.is_device_cpu(device):
            dtype = torch.float32
        encoders = core_load_text_encoders(clip_path, t5_path, dtype=dtype)
        return TextModule(encoders, dtype, notice).to(device)

    return comfy.sd.CLIP(SimpleNamespace(params={}, clip=module, tokenizer=_tokens))


def _tokens(embedding_directory: Any = None, tokenizer_data: Any = None) -> PromptTokens:
    return PromptTokens()


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
    module = vae.first_stage_model = VAEModule(load_autoencoder(path, vae.vae_dtype))
    management.archive_model_dtypes(module)
    vae.patcher = comfy.model_patcher.CoreModelPatcher(module, vae.device, management.vae_offload_device())
    vae.model_size()
    return vae


def _no_weights_yet(record: logging.LogRecord) -> bool:
    """Drop ComfyUI's warning about a VAE without weights: they follow at once."""
    return "No VAE weights detected" not in record.getMessage()


# Running


def t5_length(model: Any) -> int:
    """T5's tokens that a FLUX.1 MODEL, ours or a stock loader's, is used with."""
    config = model.model.model_config.unet_config
    channels = config["in_channels"] * ComfyNetwork.patch_size**2
    return replace(FLUX_SCHNELL, in_channels=channels, guidance_embed=config["guidance_embed"]).txt_length


def encode_text(
    clip: Any, prompt: str, clip_prompt: str, guidance: float | None, length: int | None
) -> _wires.Entries:
    """A CONDITIONING by any CLIP of FLUX.1, ours or a stock loader's."""
    tokens, t5_tokens = clip.tokenize(clip_prompt), clip.tokenize(prompt)
    if "l" not in tokens or "t5xxl" not in t5_tokens:
        raise TypeError(
            f"FLUX.1 needs CLIP-L and T5, this CLIP has {', '.join(map(str, tokens)) or 'neither'}; "
            "connect Load FLUX Text Encoders"
        )
    tokens["t5xxl"] = t5_tokens["t5xxl"]
    if length is not None:
        ours = isinstance(tokens["t5xxl"], str)
        tokens |= {"t5_length": length} if ours else {"t5xxl": of_length(tokens["t5xxl"], length)}
    extra = {} if guidance is None else {"guidance": guidance}
    return clip.encode_from_tokens_scheduled(tokens, add_dict=extra)


def of_length(batches: list[list[tuple[Any, ...]]], length: int) -> list[list[tuple[Any, ...]]]:
    """ComfyUI's T5 tokens, (id or embedding, weight), cut or padded to `length`, their own at OWN_LENGTH.

    The end mark stays at the end.
    """
    cut = []
    for batch in batches:
        ids = [token[0] if isinstance(token[0], int) else None for token in batch]
        end = max((i for i, number in enumerate(ids) if number == T5_END), default=len(batch) - 1)
        words = batch[: end + 1]
        wanted = length or len(words)
        if len(words) > wanted:
            words = [*words[: wanted - 1], words[-1]]
        cut.append(words + [(T5_PAD, 1.0)] * (wanted - len(words)))
    return cut


def notice(text: str) -> None:
    """Show a sentence at the node that is being run."""
    from comfy_execution.utils import get_executing_context
    from server import PromptServer

    context = get_executing_context()
    if context is not None:
        PromptServer.instance.send_progress_text(text, context.node_id)


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
