"""Our MODEL, CLIP, VAE, NOISE, SIGMAS and SAMPLER with ComfyUI's own nodes, and its own with ours."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ..nodes import graphs
from ..nodes.tiny import NAMES, SPEC
from .server import ComfyServer

STEPS = 8
SHIFT = {"steps": STEPS, "shift": "fixed", "mu": 1.15}  # what stock samplers use with FLUX at every size


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures, in dB; infinite for equal ones."""
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def picture(comfy: ComfyServer, prompt: graphs.Prompt, images: str = "decode") -> np.ndarray:
    save = graphs.node("SaveImage", images=[images, 0], filename_prefix="stock")
    return comfy.pictures(prompt | {"save": save}, "save")


@pytest.fixture(scope="module")
def ours(comfy: ComfyServer, files: graphs.Prompt) -> np.ndarray:
    """Our own nodes' picture, at the sigmas of stock samplers."""
    return picture(comfy, graphs.text_to_image(files, **SHIFT))


def test_stock_ksampler_and_vae_decode(comfy: ComfyServer, files: graphs.Prompt, ours: np.ndarray) -> None:
    """The `simple` scheduler takes its sigmas from a table, 2.4e-4 off ours at most."""
    prompt = graphs.text_to_image(files, **SHIFT)
    prompt["sample"] = graphs.node(
        "KSampler",
        model=["model", 0],
        seed=7,
        steps=STEPS,
        cfg=3.0,
        sampler_name="euler",
        scheduler="simple",
        positive=["positive", 0],
        negative=["negative", 0],
        latent_image=["latent", 0],
        denoise=1.0,
    )
    prompt["decode"] = graphs.node("VAEDecode", samples=["sample", 0], vae=["vae", 0])
    assert psnr(picture(comfy, prompt), ours) >= 40


def custom_advanced(prompt: graphs.Prompt, model: list[Any]) -> graphs.Prompt:
    """The prompt with SamplerCustomAdvanced in place of our sampler: our NOISE, SAMPLER and SIGMAS go in."""
    guider = graphs.node(
        "CFGGuider", model=model, positive=["positive", 0], negative=["negative", 0], cfg=3.0
    )
    sample = graphs.node(
        "SamplerCustomAdvanced",
        noise=["noise", 0],
        guider=["guider", 0],
        sampler=["solver", 0],
        sigmas=["schedule", 0],
        latent_image=["latent", 0],
    )
    return prompt | {"guider": guider, "sample": sample}


def test_stock_custom_sampler(comfy: ComfyServer, files: graphs.Prompt, ours: np.ndarray) -> None:
    """The same sigmas to the last bit, hence the same picture."""
    prompt = custom_advanced(graphs.text_to_image(files, **SHIFT), ["model", 0])
    assert np.array_equal(picture(comfy, prompt), ours)


def test_stock_sampler_in_our_node(comfy: ComfyServer, files: graphs.Prompt, ours: np.ndarray) -> None:
    prompt = graphs.text_to_image(files, **SHIFT)
    prompt["solver"] = graphs.node("KSamplerSelect", sampler_name="euler")
    assert psnr(picture(comfy, prompt), ours) >= 60


def test_model_of_a_stock_loader(comfy: ComfyServer, files: graphs.Prompt, ours: np.ndarray) -> None:
    """ComfyUI's own FLUX network on the same file; it is another implementation of the same mathematics."""
    prompt = graphs.text_to_image(files, **SHIFT)
    name = NAMES["diffusion_models"]
    prompt["model"] = graphs.node("UNETLoader", unet_name=name, weight_dtype="default")
    assert psnr(picture(comfy, prompt), ours) >= 40


def test_stock_prompt_nodes(comfy: ComfyServer, files: graphs.Prompt, ours: np.ndarray) -> None:
    prompt = graphs.text_to_image(files, **SHIFT)
    text = prompt["positive"]["inputs"]["prompt"]
    prompt["positive"] = graphs.node("CLIPTextEncode", clip=["clip", 0], text=text)
    prompt["negative"] = graphs.node(
        "CLIPTextEncodeFlux", clip=["clip", 0], clip_l="", t5xxl="", guidance=3.5
    )
    assert np.array_equal(picture(comfy, prompt), ours)


def test_stock_vae_nodes(comfy: ComfyServer, files: graphs.Prompt) -> None:
    """Encoded by ours and by ComfyUI's node, decoded by ComfyUI's, whole and in tiles."""
    tiles = {"tile_size": 256, "overlap": 64, "temporal_size": 64, "temporal_overlap": 8}
    prompt = files | {
        "picture": graphs.node("EmptyImage", width=512, height=256, batch_size=1, color=0x3366CC),
        "ours": graphs.node("RectifluxVAEEncode", image=["picture", 0], vae=["vae", 0]),
        "stock": graphs.node("VAEEncode", pixels=["picture", 0], vae=["vae", 0]),
        "a": graphs.node("VAEDecode", samples=["ours", 0], vae=["vae", 0]),
        "b": graphs.node("RectifluxVAEDecode", samples=["stock", 0], vae=["vae", 0]),
        "tiled": graphs.node("VAEEncodeTiled", pixels=["picture", 0], vae=["vae", 0], **tiles),
        "c": graphs.node("VAEDecodeTiled", samples=["tiled", 0], vae=["vae", 0], **tiles),
    }
    assert np.array_equal(picture(comfy, prompt, "a"), picture(comfy, prompt, "b"))
    assert picture(comfy, prompt, "c").shape == (1, 256, 512, 3)


def lora(keys: dict[str, tuple[int, int]], down: str, up: str, seed: int) -> dict[str, torch.Tensor]:
    """A random LoRA of rank 4 on layers named by `keys`, each (outputs, inputs)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, (outputs, inputs) in keys.items():
        tensors[f"{key}.{down}.weight"] = 0.2 * torch.randn(4, inputs, generator=generator)
        tensors[f"{key}.{up}.weight"] = 0.2 * torch.randn(outputs, 4, generator=generator)
    return tensors


HIDDEN = SPEC.hidden_size
LORAS = {
    "kohya": lora(
        {
            "lora_unet_double_blocks_0_img_attn_qkv": (3 * HIDDEN, HIDDEN),
            "lora_unet_single_blocks_1_linear1": (7 * HIDDEN, HIDDEN),
            "lora_unet_double_blocks_1_txt_mod_lin": (6 * HIDDEN, HIDDEN),
        },
        "lora_down", "lora_up", 1,
    ),
    "bfl": lora(
        {
            "diffusion_model.double_blocks.0.img_attn.qkv": (3 * HIDDEN, HIDDEN),
            "diffusion_model.single_blocks.1.linear2": (HIDDEN, 5 * HIDDEN),
        },
        "lora_A", "lora_B", 2,
    ),
    "diffusers": lora(
        {
            "transformer.transformer_blocks.0.attn.to_q": (HIDDEN, HIDDEN),
            "transformer.single_transformer_blocks.1.proj_mlp": (4 * HIDDEN, HIDDEN),
        },
        "lora_A", "lora_B", 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LORAS)
def test_stock_lora_loader(
    comfy: ComfyServer, base: Path, files: graphs.Prompt, ours: np.ndarray, kind: str
) -> None:
    """Every key is found, the picture changes, and strength 0 gives the old one back afterwards."""
    save_file(LORAS[kind], base / "models" / "loras" / f"{kind}.safetensors")
    before = comfy.console()
    prompt = graphs.text_to_image(files, **SHIFT)
    prompt["lora"] = graphs.node(
        "LoraLoaderModelOnly", model=["model", 0], lora_name=f"{kind}.safetensors", strength_model=1.0
    )
    prompt["sample"]["inputs"]["model"] = ["lora", 0]
    assert psnr(picture(comfy, prompt), ours) < 40
    said = comfy.console()[len(before) :].lower()
    assert "not loaded" not in said and "error" not in said
    prompt["lora"]["inputs"]["strength_model"] = 0.0
    assert np.array_equal(picture(comfy, prompt), ours)


def test_stock_lora_loader_on_the_text_encoders(
    comfy: ComfyServer, base: Path, files: graphs.Prompt, ours: np.ndarray
) -> None:
    keys = {
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (64, 64),
        "lora_te2_encoder_block_0_layer_0_SelfAttention_q": (32, 32),
    }
    save_file(lora(keys, "lora_down", "lora_up", 4), base / "models" / "loras" / "text.safetensors")
    before = comfy.console()
    prompt = graphs.text_to_image(files, **SHIFT)
    prompt["lora"] = graphs.node(
        "LoraLoader",
        model=["model", 0],
        clip=["clip", 0],
        lora_name="text.safetensors",
        strength_model=1.0,
        strength_clip=1.0,
    )
    prompt["positive"]["inputs"]["clip"] = ["lora", 1]
    assert not np.array_equal(picture(comfy, prompt), ours)
    assert "not loaded" not in comfy.console()[len(before) :].lower()
