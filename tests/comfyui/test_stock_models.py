"""A MODEL of ComfyUI's own loader in our nodes, and ours under what ComfyUI's nodes do to a MODEL.

The two networks are two implementations of the same mathematics: whatever is done to both, they must agree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rectiflux.flux_core.sampling.solver import SOLVERS
from safetensors.torch import save_file

from ..nodes import graphs
from ..nodes.tiny import SPEC
from .pictures import FLOWS, custom_advanced, k_sampler, our_graph, picture, psnr, stock_model
from .server import ComfyServer


@pytest.fixture(scope="module")
def ours(comfy: ComfyServer, files: graphs.Prompt) -> np.ndarray:
    return picture(comfy, our_graph(files))


def agree(comfy: ComfyServer, prompt: graphs.Prompt) -> bool:
    """Whether our network and ComfyUI's give the same picture."""
    return psnr(picture(comfy, prompt), picture(comfy, stock_model(prompt))) >= 40


@pytest.mark.parametrize("solver", SOLVERS)
def test_our_sampler_and_solvers_take_a_stock_model(
    comfy: ComfyServer, files: graphs.Prompt, solver: str
) -> None:
    prompt = our_graph(files, solver=solver)
    assert agree(comfy, prompt)
    assert agree(comfy, custom_advanced(prompt))


def test_our_sampler_takes_a_stock_model_without_guidance_input(
    comfy: ComfyServer, files: graphs.Prompt
) -> None:
    assert agree(comfy, our_graph(files, "schnell", width=144, height=80, batch_size=2))


@pytest.mark.parametrize("kind", FLOWS)
@pytest.mark.parametrize(
    "settings",
    [
        {"sampler_name": "euler", "scheduler": "normal", "denoise": 0.5},
        {"sampler_name": "dpmpp_2m", "scheduler": "beta"},
        {"sampler_name": "euler_ancestral", "scheduler": "sgm_uniform"},
    ],
    ids=lambda settings: settings["scheduler"],
)
def test_stock_samplers_and_schedulers_treat_our_model_as_theirs(
    comfy: ComfyServer, files: graphs.Prompt, kind: str, settings: dict[str, Any]
) -> None:
    """Also where they ask the MODEL which sigmas it likes."""
    assert agree(comfy, k_sampler(our_graph(files, kind), **settings))


COMBINED = {
    "both": graphs.node("ConditioningCombine", conditioning_1=["positive", 0], conditioning_2=["other", 0]),
    "joined": graphs.node(
        "ConditioningConcat", conditioning_to=["positive", 0], conditioning_from=["other", 0]
    ),
    "mean": graphs.node(
        "ConditioningAverage",
        conditioning_to=["positive", 0],
        conditioning_from=["other", 0],
        conditioning_to_strength=0.4,
    ),
    "late": graphs.node("ConditioningCombine", conditioning_1=["positive", 0], conditioning_2=["end", 0]),
    "left": graphs.node("ConditioningCombine", conditioning_1=["positive", 0], conditioning_2=["area", 0]),
    "none": graphs.node("ConditioningZeroOut", conditioning=["positive", 0]),
}


@pytest.mark.parametrize("way", COMBINED)
def test_combined_prompts(comfy: ComfyServer, files: graphs.Prompt, ours: np.ndarray, way: str) -> None:
    prompt = our_graph(files) | {
        "other": graphs.node("RectifluxTextEncode", clip=["clip", 0], prompt="a blue star", guidance=2.0),
        "end": graphs.node("ConditioningSetTimestepRange", conditioning=["other", 0], start=0.5, end=1.0),
        "area": graphs.node(
            "ConditioningSetAreaPercentage", conditioning=["other", 0], width=0.5, height=1.0, x=0, y=0,
            strength=1.0,
        ),
        "combined": COMBINED[way],
    }  # fmt: skip
    prompt["sample"]["inputs"]["positive"] = ["combined", 0]
    assert agree(comfy, prompt)
    assert psnr(picture(comfy, prompt), ours) < 40


PATCHES = {
    "ModelSamplingFlux": {"max_shift": 2.0, "base_shift": 2.0, "width": 64, "height": 48},
    "RescaleCFG": {"multiplier": 0.7},
    "CFGZeroStar": {},
    "SkipLayerGuidanceDiT": {
        "double_layers": "0",
        "single_layers": "1",
        "scale": 3.0,
        "start_percent": 0.01,
        "end_percent": 0.9,
        "rescaling_scale": 0.0,
    },
    "EasyCache": {"reuse_threshold": 2.0, "start_percent": 0.1, "end_percent": 0.9, "verbose": False},
}


@pytest.mark.parametrize("node", PATCHES)
def test_patched_models(comfy: ComfyServer, files: graphs.Prompt, node: str) -> None:
    """By KSampler, as ModelSamplingFlux changes which sigmas it takes; and the patch counts."""
    plain = k_sampler(our_graph(files))
    prompt = our_graph(files) | {"patched": graphs.node(node, model=["model", 0], **PATCHES[node])}
    prompt["sample"]["inputs"]["model"] = ["patched", 0]
    prompt = k_sampler(prompt)
    assert agree(comfy, prompt)
    assert psnr(picture(comfy, prompt), picture(comfy, plain)) < 40


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
    """Every key is found, the picture is that of ComfyUI's network with it, strength 0 undoes it."""
    save_file(LORAS[kind], base / "models" / "loras" / f"{kind}.safetensors")
    before = comfy.console()
    prompt = our_graph(files)
    prompt["lora"] = graphs.node(
        "LoraLoaderModelOnly", model=["model", 0], lora_name=f"{kind}.safetensors", strength_model=1.0
    )
    prompt["sample"]["inputs"]["model"] = ["lora", 0]
    assert psnr(picture(comfy, prompt), ours) < 40
    assert agree(comfy, prompt)
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
    prompt = our_graph(files)
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
