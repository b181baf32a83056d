"""Kontext, Fill and control images in ComfyUI: our nodes beside its own, with our MODEL and VAE."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ..nodes import graphs
from ..nodes.tiny import SPEC, write_transformer
from .pictures import our_graph, picture, psnr
from .server import ComfyServer

WIDTH, HEIGHT = 64, 48


@pytest.fixture(scope="module")
def photo(base: Path, comfy: ComfyServer) -> str:
    """An image whose alpha is 0 in a rectangle, which is LoadImage's mask."""
    values = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
    values[..., 3] = 255
    values[10:30, 14:40, 3] = 0
    Image.fromarray(values).save(base / "input" / "photo.png")
    return "photo.png"


def graph(files: graphs.Prompt, base: Path, photo: str, channels: int = 64) -> graphs.Prompt:
    """Our own nodes without an image, with a model of so many input channels, and the image loaded."""
    name = f"tiny-{channels}-image.safetensors"
    path = base / "models" / "diffusion_models" / name
    if not path.exists():
        write_transformer(path, replace(SPEC, in_channels=channels))
    prompt = our_graph(files) | {"photo": graphs.node("LoadImage", image=photo)}
    prompt["model"] = graphs.node("RectifluxModelLoader", model_name=name, weight_dtype="auto")
    prompt["sample"]["inputs"]["positive"] = ["image", 0]
    prompt["sample"]["inputs"]["cfg_scale"] = 1.0
    return prompt


def from_latent(prompt: graphs.Prompt, latent: list) -> graphs.Prompt:
    prompt["sample"]["inputs"]["latent"] = prompt["schedule"]["inputs"]["latent"] = latent
    return prompt


@pytest.mark.parametrize("method", ["offset", "index", "uxo", "index_timestep_zero"])
def test_a_kontext_reference(
    comfy: ComfyServer, files: graphs.Prompt, base: Path, photo: str, method: str
) -> None:
    """ReferenceLatent and FluxKontextMultiReferenceLatentMethod."""
    shared = {"conditioning": ["positive", 0], "vae": ["vae", 0], "image": ["photo", 0], "method": method}
    ours = graph(files, base, photo)
    ours["image"] = graphs.node("RectifluxKontextReference", strength=1.0, **shared)
    stock = graph(files, base, photo)
    stock["encoded"] = graphs.node("VAEEncode", pixels=["photo", 0], vae=["vae", 0])
    stock["reference"] = graphs.node("ReferenceLatent", conditioning=["positive", 0], latent=["encoded", 0])
    stock["image"] = graphs.node(
        "FluxKontextMultiReferenceLatentMethod",
        conditioning=["reference", 0],
        reference_latents_method="uxo/uno" if method == "uxo" else method,
    )
    shown = picture(comfy, ours)
    assert psnr(shown, picture(comfy, stock)) >= 80
    weaker = graph(files, base, photo)
    weaker["image"] = graphs.node("RectifluxKontextReference", strength=0.3, **shared)
    without = graph(files, base, photo)
    without["sample"]["inputs"]["positive"] = ["positive", 0]
    removed = graph(files, base, photo)
    removed["image"] = graphs.node("RectifluxKontextReference", strength=0.0, **shared)
    assert psnr(picture(comfy, weaker), shown) < 60
    assert psnr(picture(comfy, removed), picture(comfy, without)) >= 80 > psnr(shown, picture(comfy, without))


def test_fill(comfy: ComfyServer, files: graphs.Prompt, base: Path, photo: str) -> None:
    """InpaintModelConditioning."""
    inputs = {"vae": ["vae", 0], "mask": ["photo", 1]}
    ours = from_latent(graph(files, base, photo, 384), ["image", 1])
    ours["image"] = graphs.node("RectifluxFill", conditioning=["positive", 0], image=["photo", 0], **inputs)
    stock = from_latent(graph(files, base, photo, 384), ["image", 2])
    stock["image"] = graphs.node(
        "InpaintModelConditioning",
        positive=["positive", 0],
        negative=["negative", 0],
        pixels=["photo", 0],
        noise_mask=True,
        **inputs,
    )
    assert psnr(picture(comfy, ours), picture(comfy, stock)) >= 80


def test_a_control_image(comfy: ComfyServer, files: graphs.Prompt, base: Path, photo: str) -> None:
    """InstructPixToPixConditioning, behind ComfyUI's Canny and behind ours with the same thresholds."""
    ours = from_latent(graph(files, base, photo, 128), ["image", 1])
    ours["edges"] = graphs.node("RectifluxCanny", image=["photo", 0], low=0.2, high=0.6)
    ours["image"] = graphs.node(
        "RectifluxControlImage", conditioning=["positive", 0], vae=["vae", 0], image=["edges", 0]
    )
    stock = from_latent(graph(files, base, photo, 128), ["image", 2])
    stock["edges"] = graphs.node("Canny", image=["photo", 0], low_threshold=0.2, high_threshold=0.6)
    stock["image"] = graphs.node(
        "InstructPixToPixConditioning",
        positive=["positive", 0],
        negative=["negative", 0],
        vae=["vae", 0],
        pixels=["edges", 0],
    )
    assert psnr(picture(comfy, ours), picture(comfy, stock)) >= 80
