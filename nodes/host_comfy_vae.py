"""ComfyUI's VAE around our autoencoder. What is relied on, as of ComfyUI 0.33: comfy/sd.py VAE.

ComfyUI is imported inside the functions, as in host_comfy_loading.py.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from ..flux_core.pipeline import LATENT_CHANNELS
from ..flux_core.weights import Source, load_autoencoder
from .host_comfy_network import VAEModule
from .host_comfy_text import progress
from .wires import VAE_FACTOR

log = logging.getLogger(__name__)

SMALLEST = {
    "embed_dim": LATENT_CHANNELS,
    "ddconfig": {
        "double_z": True,
        "z_channels": LATENT_CHANNELS,
        "resolution": 8,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1],
        "num_res_blocks": 0,
        "attn_resolutions": [],
        "dropout": 0.0,
    },
}
"""Sizes of the smallest autoencoder of FLUX.1's kind that ComfyUI can build."""


def load_vae(source: Source) -> Any:
    """A comfy.sd.VAE around our autoencoder."""
    import comfy.model_management as management
    import comfy.model_patcher

    vae = _flux_vae()
    module = vae.first_stage_model = VAEModule(
        load_autoencoder(source, vae.vae_dtype, on_progress=progress())
    )
    management.archive_model_dtypes(module)
    vae.patcher = comfy.model_patcher.CoreModelPatcher(module, vae.device, management.vae_offload_device())
    # where memory is low, the plain patcher would not load the convolutions, which are not ComfyUI's own
    vae.disable_offload = not vae.patcher.is_dynamic()
    vae.size = None
    vae.model_size()
    return vae


def _flux_vae() -> Any:
    """A comfy.sd.VAE with the settings of FLUX.1's autoencoder and the smallest network in its place.

    ComfyUI's VAE builds its network itself, of its own sizes; this one is replaced by ours.
    """
    import comfy.sd
    from comfy.ldm.models.autoencoder import AutoencoderKL

    class FluxVAE(comfy.sd.VAE):
        """Crops images to multiples of 8, in the middle, and says so; its weights can be saved."""

        def get_sd(self) -> dict[str, Tensor]:
            """In the layout that files have; here convolutions are channels-last."""
            return {name: tensor.contiguous() for name, tensor in super().get_sd().items()}

        def vae_encode_crop_pixels(self, pixels: Tensor) -> Tensor:
            height, width = (side // VAE_FACTOR * VAE_FACTOR for side in pixels.shape[1:3])
            top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
            if (height, width) != tuple(pixels.shape[1:3]):
                given = f"{pixels.shape[2]}x{pixels.shape[1]}"
                log.warning("an image of %s was cropped to %sx%s to be encoded", given, width, height)
            return pixels[:, top : top + height, left : left + width, :3]

    vae = FluxVAE(AutoencoderKL(**SMALLEST).state_dict(), config={"params": SMALLEST})
    vae.latent_channels = LATENT_CHANNELS
    return vae


def check_vae(vae: Any) -> None:
    """Raise TypeError unless the VAE is for FLUX.1's latents."""
    channels = getattr(vae, "latent_channels", LATENT_CHANNELS)
    if channels != LATENT_CHANNELS:
        raise TypeError(
            f"FLUX.1's VAE has {LATENT_CHANNELS} latent channels, got {channels}; connect Load FLUX VAE"
        )
