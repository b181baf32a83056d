"""What Load FLUX LoRA asks of a MODEL of ComfyUI's, without ComfyUI; the rest is in tests/comfyui."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from rectiflux.flux_core.model.spec import FLUX_DEV
from rectiflux.flux_core.model.transformer import FluxTransformer
from rectiflux.nodes import host_comfy_lora as _comfy_lora
from rectiflux.nodes.host_comfy_network import ComfyNetwork

from .tiny import SPEC

DEV = {
    "image_model": "flux",
    "hidden_size": 3072,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "context_in_dim": 4096,
    "vec_in_dim": 768,
    "in_channels": 16,
    "mlp_ratio": 4.0,
    "guidance_embed": True,
}
"""What ComfyUI finds out about FLUX.1 [dev] (comfy/model_detection.py)."""


def model(config: dict[str, Any], network: Any = None) -> SimpleNamespace:
    inner = SimpleNamespace(diffusion_model=network, model_config=SimpleNamespace(unet_config=config))
    return SimpleNamespace(model=inner)


def test_the_sizes_of_a_stock_model_and_of_ours() -> None:
    assert _comfy_lora._spec_of(model(DEV)) == FLUX_DEV
    assert _comfy_lora._spec_of(model({**DEV, "in_channels": 96})) == replace(FLUX_DEV, in_channels=384)
    assert _comfy_lora._spec_of(model({}, ComfyNetwork(FluxTransformer(SPEC)))) == SPEC


@pytest.mark.parametrize(("config", "name"), [({"image_model": "flux2"}, "flux2"), ({}, "SimpleNamespace")])
def test_a_model_of_another_kind_is_refused(config: dict[str, Any], name: str) -> None:
    message = f"a FLUX.1 LoRA needs a FLUX.1 model, got {name}; connect Load FLUX Model"
    with pytest.raises(TypeError, match=message):
        _comfy_lora._spec_of(model(config))


def test_a_control_lora_among_the_patches_tells_how_wide_img_in_is() -> None:
    control = SimpleNamespace(calculate_shape=lambda key: (3072, 128))
    plain = SimpleNamespace(calculate_shape=lambda key: None)
    patches = {
        _comfy_lora.IMG_IN: [(1.0, patch, 1.0, None, None) for patch in (plain, control, ("diff", ()))]
    }
    assert _comfy_lora._inputs(SimpleNamespace(patches=patches), FLUX_DEV) == 128
    assert _comfy_lora._inputs(SimpleNamespace(patches={}), FLUX_DEV) == 64
