"""Pictures of the tiny models in ComfyUI, and how far apart two are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..nodes import graphs
from ..nodes.tiny import NAMES
from .conftest import DEV
from .server import ComfyServer

STEPS = 8
FLOWS = {
    "dev": (DEV, {"steps": STEPS, "shift": "fixed", "mu": 1.15}),
    "schnell": (NAMES["diffusion_models"], {"steps": STEPS, "shift": "none"}),
}
"""Transformer file, and our schedule that is ComfyUI's `simple` for it: shifted by e^1.15 at every size for
[dev], not at all for a model without guidance input."""


def largest_difference(a: np.ndarray, b: np.ndarray) -> int:
    """In levels of 255."""
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures, in dB; infinite for equal ones."""
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def picture(comfy: ComfyServer, prompt: graphs.Prompt, images: str = "decode") -> np.ndarray:
    """The picture that a node gives; fails for a flat one, which would be like any other flat one."""
    save = graphs.node("SaveImage", images=[images, 0], filename_prefix="stock")
    shown = comfy.pictures(prompt | {"save": save}, "save")
    assert shown.std() > 20
    return shown


def our_graph(files: graphs.Prompt, kind: str = "dev", **settings: Any) -> graphs.Prompt:
    """Our own nodes on a kind of transformer, at the sigmas that stock samplers would choose."""
    name, schedule = FLOWS[kind]
    prompt = graphs.text_to_image(files, **{**schedule, **settings})
    prompt["model"] = graphs.node("RectifluxModelLoader", model_name=name, weight_dtype="auto")
    return prompt


def k_sampler(prompt: graphs.Prompt, **settings: Any) -> graphs.Prompt:
    """The prompt with ComfyUI's KSampler in place of our sampler, noise, solver and schedule."""
    inputs = {
        "model": prompt["sample"]["inputs"]["model"],
        "seed": 7,
        "steps": STEPS,
        "cfg": 3.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "positive": prompt["sample"]["inputs"]["positive"],
        "negative": prompt["sample"]["inputs"]["negative"],
        "latent_image": ["latent", 0],
        "denoise": 1.0,
    }
    return prompt | {"sample": graphs.node("KSampler", **{**inputs, **settings})}


def custom_advanced(prompt: graphs.Prompt) -> graphs.Prompt:
    """The prompt with SamplerCustomAdvanced in place of our sampler: our NOISE, SAMPLER and SIGMAS go in."""
    inputs = {name: prompt["sample"]["inputs"][name] for name in ("model", "positive", "negative")}
    sample = graphs.node(
        "SamplerCustomAdvanced",
        noise=["noise", 0],
        guider=["guider", 0],
        sampler=["solver", 0],
        sigmas=["schedule", 0],
        latent_image=["latent", 0],
    )
    return prompt | {"guider": graphs.node("CFGGuider", **inputs, cfg=3.0), "sample": sample}


def stock_model(prompt: graphs.Prompt) -> graphs.Prompt:
    """The prompt with ComfyUI's own network, read by its own loader, in place of ours."""
    name = prompt["model"]["inputs"]["model_name"]
    return prompt | {"model": graphs.node("UNETLoader", unet_name=name, weight_dtype="default")}


def same_to_rounding(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two pictures of 255 levels differ by one level at most, and in no more than a thousandth."""
    return largest_difference(one, other) <= 1 and float((one != other).mean()) <= 1e-3
