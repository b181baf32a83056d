"""Latents, schedules and images at the edge of what ComfyUI's nodes make, in our nodes and VAE: prints JSON.

Run by ComfyUI's Python, in its checkout: python inside_latents.py PACK MODEL FILL_MODEL VAE, where VAE has
the sizes below. Values are dB to what ComfyUI's own objects give on the same weights, or what is said.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from inside import load_pack
from inside_chaining import ODD, empty, find_nodes, image_latent, k_sampler, masked, node, sigmas_of
from inside_patches import conditioning, decibels, drawn
from torch import Tensor

SIZES = {
    "double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 2, 2, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip


class Heard(logging.Handler):
    """Keeps the warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def our_node(name: str, **inputs: Any) -> Any:
    kind = sys.modules["pack"].NODE_CLASS_MAPPINGS[name]
    return getattr(kind(), kind.FUNCTION)(**inputs)


def stock_vae(path: str) -> Any:
    """ComfyUI's VAE of FLUX.1's kind in these sizes, which its loader would not choose."""
    import comfy.model_patcher
    import comfy.sd
    import comfy.utils
    from comfy.ldm.models.autoencoder import AutoencoderKL, AutoencodingEngine

    params = {"embed_dim": 16, "ddconfig": {**SIZES, "ch_mult": [1], "num_res_blocks": 0}}
    vae = comfy.sd.VAE(AutoencoderKL(**params).state_dict(), config={"params": params})
    part = "comfy.ldm.modules.diffusionmodules.model."
    network = AutoencodingEngine(
        regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
        encoder_config={"target": f"{part}Encoder", "params": SIZES},
        decoder_config={"target": f"{part}Decoder", "params": SIZES},
    )
    network.load_state_dict(comfy.utils.load_torch_file(path))
    vae.latent_channels, vae.first_stage_model = 16, network.eval()
    vae.patcher = comfy.model_patcher.CoreModelPatcher(network, vae.device, vae.device)
    return vae


def vaes(stock: Any, ours: Any, heard: Heard) -> dict[str, Any]:
    """Images of 120 and of 125 lines, and an odd latent, through ComfyUI's nodes and ours."""
    image, latent = drawn(2, 120, 136, 3, seed=41, scale=0.2) + 0.5, image_latent((15, 17), 2)
    mask = torch.zeros(1, 120, 136)
    mask[:, 30:80, 40:100] = 1.0
    tiles = {"tile_size": 96, "overlap": 16, "temporal_size": 64, "temporal_overlap": 8}
    found: dict[str, Any] = {"shape": [*node("VAEEncode", vae=ours, pixels=image)[0]["samples"].shape]}

    def compare(name: str, **inputs: Any) -> None:
        theirs, mine = (node(name, vae=vae, **inputs)[0] for vae in (stock, ours))
        if isinstance(theirs, dict):
            theirs, mine = theirs["samples"], mine["samples"]
        assert theirs.shape == mine.shape
        found[name] = decibels(mine, theirs)

    compare("VAEEncode", pixels=image)
    compare("VAEEncodeTiled", pixels=image, **tiles)
    compare("VAEEncodeForInpaint", pixels=image, mask=mask, grow_mask_by=6)
    compare("VAEDecode", samples=latent)
    compare("VAEDecodeTiled", samples=latent, **tiles)
    found["our decode"] = decibels(
        our_node("RectifluxVAEDecode", samples=latent, vae=ours)[0],
        node("VAEDecode", samples=latent, vae=stock)[0],
    )
    heard.messages.clear()
    larger = torch.nn.functional.pad(image, (0, 0, 1, 2, 2, 3))  # 139 x 125, cropped in the middle
    cropped = node("VAEEncode", vae=ours, pixels=larger)[0]["samples"]
    found["cropped"] = [decibels(cropped, node("VAEEncode", vae=ours, pixels=image)[0]["samples"])]
    found["cropped"] += heard.messages
    return found


def inpainting(stock: Any, ours: Any, stock_vae: Any, our_vae: Any) -> list[float]:
    """InpaintModelConditioning on a Fill model, at an odd size."""
    image, mask = drawn(1, 120, 136, 3, seed=41, scale=0.2) + 0.5, torch.ones(1, 120, 136).tril()
    results = []
    for model, vae in ((stock, stock_vae), (ours, our_vae)):
        positive, negative, latent = node(
            "InpaintModelConditioning", positive=conditioning(), negative=conditioning(), vae=vae,
            pixels=image, mask=mask, noise_mask=True,
        )  # fmt: skip
        results.append(k_sampler(model, positive=positive, negative=negative, cfg=1.0, latent_image=latent))
    plain = k_sampler(stock, cfg=1.0, latent_image=empty((15, 17)))
    return [decibels(results[0], plain), decibels(results[1], results[0])]


def sampled(model: Any, latent: dict[str, Any], sigmas: Tensor) -> tuple[dict[str, Any], str]:
    """Our sampler with our noise and ComfyUI's euler."""
    return our_node(
        "RectifluxSampler", model=model, positive=conditioning(), cfg_scale=1.0, latent=latent, sigmas=sigmas,
        noise=our_node("RectifluxNoise", seed=7)[0], sampler=our_node("RectifluxSolver", solver="euler")[0],
    )  # fmt: skip


def custom(model: Any, latent: dict[str, Any], sigmas: Tensor, solver: Any) -> Tensor:
    """SamplerCustomAdvanced with our noise."""
    return node(
        "SamplerCustomAdvanced", noise=our_node("RectifluxNoise", seed=7)[0], sampler=solver, sigmas=sigmas,
        guider=node("BasicGuider", model=model, conditioning=conditioning())[0], latent_image=latent,
    )[0]["samples"]  # fmt: skip


def ends(stock: Any, ours: Any) -> dict[str, Any]:
    """Schedules of which nothing is left, in our sampler and in ComfyUI's with our solver."""
    sigmas = sigmas_of(ours)
    splits = {
        "last": node("SplitSigmas", sigmas=sigmas, step=2)[1],
        "beyond": node("SplitSigmas", sigmas=sigmas, step=5)[1],
        "first": node("SplitSigmas", sigmas=sigmas, step=0)[0],
        "denoise 0": node("SplitSigmasDenoise", sigmas=sigmas, denoise=0.0)[1],
    }
    euler, mine = (
        node("KSamplerSelect", sampler_name="euler")[0],
        our_node("RectifluxSolver", solver="euler")[0],
    )
    found: dict[str, Any] = {}
    for name, split in splits.items():
        start = masked(image_latent())
        latent, report = sampled(ours, start, split)
        same = torch.equal(latent["samples"], start["samples"]) and "steps: 0" in report
        theirs = custom(stock, start, split, euler)
        as_theirs = torch.equal(custom(ours, start, split, mine).nan_to_num(), theirs.nan_to_num())
        found[name] = [len(split), same, as_theirs]
    theirs = custom(stock, masked(image_latent(ODD, 2)), sigmas, euler)
    found["our solver on an odd latent"] = decibels(
        custom(ours, masked(image_latent(ODD, 2)), sigmas, mine), theirs
    )
    return found


def empties(ours: Any) -> dict[str, bool]:
    """ComfyUI's empty latents in our sampler, a batch of two with a mask, against our own."""
    own = our_node("RectifluxEmptyLatent", width=112, height=80, batch_size=2)[0]
    made = {
        "EmptyLatentImage": node("EmptyLatentImage", width=112, height=80, batch_size=2)[0],
        "EmptySD3LatentImage": node("EmptySD3LatentImage", width=112, height=80, batch_size=2)[0],
    }
    expected = sampled(ours, masked(own), sigmas_of(ours))[0]["samples"]
    return {
        name: torch.equal(sampled(ours, masked(latent), sigmas_of(ours))[0]["samples"], expected)
        for name, latent in made.items()
    }


def schedules(ours: Any) -> dict[str, str]:
    """What our sampler says about each of ComfyUI's schedulers; nothing for those that it takes."""
    import comfy.samplers

    checked_sigmas = sys.modules["pack.nodes.wires"].checked_sigmas
    said = {}
    for name in comfy.samplers.SCHEDULER_NAMES:
        for steps in (1, 2, 20, 1000):
            sigmas = node("BasicScheduler", model=ours, scheduler=name, steps=steps, denoise=1.0)[0]
            try:
                checked_sigmas(sigmas)
            except ValueError as error:
                said[f"{name}, {steps}"] = str(error)
    return said


@torch.inference_mode()
def main(pack: str, path: str, fill_path: str, vae_path: str) -> dict[str, Any]:
    hosts, _ = load_pack(Path(pack))
    find_nodes()
    import comfy.sd

    heard = Heard()
    logging.getLogger().addHandler(heard)
    ours, stock = hosts.load_model(Path(path), "auto", "auto"), comfy.sd.load_diffusion_model(path)
    theirs = stock_vae(vae_path)
    mine = importlib.import_module("pack.nodes.host_comfy_vae").load_vae(Path(vae_path))
    found = {"vaes": vaes(theirs, mine, heard), "ends": ends(stock, ours), "empty": empties(ours)}
    fill = hosts.load_model(Path(fill_path), "auto", "auto"), comfy.sd.load_diffusion_model(fill_path)
    found["InpaintModelConditioning"] = inpainting(fill[1], fill[0], theirs, mine)
    found["schedules"] = schedules(ours)
    return found


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
