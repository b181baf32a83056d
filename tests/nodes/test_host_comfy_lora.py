"""Load FLUX LoRA on ComfyUI's MODEL, as far as it can be tested without ComfyUI; the rest: tests/comfyui."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rectiflux.benchmarks.reference.models import SPEC as SPEC_OF_CASES
from rectiflux.flux_core.lora import read_lora
from rectiflux.flux_core.model.spec import FLUX_DEV
from rectiflux.flux_core.model.transformer import FluxTransformer
from rectiflux.nodes.host_comfy_lora import IMG_IN, comfy_adapter, img_in_width, spec_of
from rectiflux.nodes.host_comfy_network import ComfyNetwork
from torch import Tensor

from ..flux_core.lora.cases import CASES, LAYER, ROWS, WIDTH, draw
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
"""What ComfyUI detects of FLUX.1 [dev] (comfy/model_detection.py)."""


def model(config: dict[str, Any], network: Any = None) -> SimpleNamespace:
    inner = SimpleNamespace(diffusion_model=network, model_config=SimpleNamespace(unet_config=config))
    return SimpleNamespace(model=inner)


def test_the_sizes_of_a_stock_model_and_of_ours() -> None:
    assert spec_of(model(DEV)) == FLUX_DEV
    assert spec_of(model({**DEV, "in_channels": 96})) == replace(FLUX_DEV, in_channels=384)
    assert spec_of(model({}, ComfyNetwork(FluxTransformer(SPEC)))) == SPEC


@pytest.mark.parametrize(("config", "name"), [({"image_model": "flux2"}, "flux2"), ({}, "SimpleNamespace")])
def test_a_model_of_another_kind_is_refused(config: dict[str, Any], name: str) -> None:
    with pytest.raises(TypeError, match=f"got {name}"):
        spec_of(model(config))


def test_a_control_lora_among_the_patches_widens_img_in() -> None:
    control = SimpleNamespace(calculate_shape=lambda key: (3072, 128))
    plain = SimpleNamespace(calculate_shape=lambda key: None)
    patches = {IMG_IN: [(1.0, patch, 1.0, None, None) for patch in (plain, control, ("diff", ()))]}
    assert img_in_width(SimpleNamespace(patches=patches), FLUX_DEV) == 128
    assert img_in_width(SimpleNamespace(patches={}), FLUX_DEV) == 64


# Adapters as ComfyUI's objects

DORA_OF_FULL = "DoRA of a full difference by columns"
WEIGHTS = {
    "LoRA": "lora_up.weight lora_down.weight alpha lora_mid.weight dora_scale reshape_weight",
    "LoHa": "hada_w1_a hada_w1_b alpha hada_w2_a hada_w2_b hada_t1 hada_t2 dora_scale",
    "LoKr": "lokr_w1 lokr_w2 alpha lokr_w1_a lokr_w1_b lokr_w2_a lokr_w2_b lokr_t2 dora_scale",
    "OFT": "oft_blocks rescale alpha dora_scale",
    "BOFT": "oft_blocks rescale alpha dora_scale",
}
"""What `weights` of ComfyUI 0.33's adapters hold, in order (comfy/weight_adapter, each class's `load`)."""


@dataclass
class ComfyAdapter:
    """Stands for ComfyUI's adapters, which keep what they are given."""

    loaded_keys: set[str]
    weights: tuple[Any, ...]


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    kinds = {f"{name}Adapter": type(name, (ComfyAdapter,), {}) for name in WEIGHTS}
    module = SimpleNamespace(weight_adapter=SimpleNamespace(**kinds))
    monkeypatch.setitem(sys.modules, "comfy", module)
    return module


def roles_of(adapter: Any) -> dict[str, Tensor]:
    """The tensors from which ComfyUI's own loader would make such an adapter."""
    if isinstance(adapter, tuple):
        kind, (difference,) = adapter
        return {kind: difference}
    names = WEIGHTS[type(adapter).__name__].split()
    return {
        name: torch.as_tensor(value)
        for name, value in zip(names, adapter.weights, strict=True)
        if value is not None
    }


@pytest.mark.parametrize("name", [name for name in CASES if name != DORA_OF_FULL])
def test_comfyui_receives_the_same_adapter(name: str, comfy: SimpleNamespace) -> None:
    """Its tensors, read as a file again, make the published change; Tucker cores are multiplied in."""
    case, w = CASES[name](), draw(40, ROWS, WIDTH)
    given = read_lora({f"{LAYER}.{role}": t for role, t in case.tensors.items()}, SPEC_OF_CASES).entries[0]
    assert given.adapter is not None
    roles = roles_of(comfy_adapter(given.adapter, WIDTH))
    again = read_lora({f"{LAYER}.{role}": t for role, t in roles.items()}, SPEC_OF_CASES).entries[0]
    expected = case.merge(w) - w
    assert again.adapter is not None
    assert (again.adapter.delta(w) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not {"lokr_t2", "hada_t1", "hada_t2"} & roles.keys()
    assert "dora_scale" not in roles or roles["dora_scale"].ndim == 2


def test_an_img_in_of_other_channels_for_comfyui(comfy: SimpleNamespace) -> None:
    """Fewer inputs are padded with zeros, more widen the weight."""
    down, up = draw(1, 2, 64), draw(2, SPEC.hidden_size, 2)
    adapter = read_lora({"img_in.lora_A.weight": down, "img_in.lora_B.weight": up}, SPEC).entries[0].adapter
    assert adapter is not None
    padded, same, wider = (roles_of(comfy_adapter(adapter, width)) for width in (96, 64, 32))
    assert torch.equal(padded["lora_down.weight"], torch.cat([down, torch.zeros(2, 32)], dim=1))
    assert "reshape_weight" not in padded.keys() | same.keys()
    assert same["lora_down.weight"].data_ptr() == down.data_ptr()
    assert wider["reshape_weight"].tolist() == [SPEC.hidden_size, 64]


def test_what_comfyui_cannot_apply_is_refused(comfy: SimpleNamespace) -> None:
    tensors = {f"{LAYER}.{role}": tensor for role, tensor in CASES[DORA_OF_FULL]().tensors.items()}
    adapter = read_lora(tensors, SPEC_OF_CASES).entries[0].adapter
    assert adapter is not None
    with pytest.raises(TypeError, match="DoRA of full difference"):
        comfy_adapter(adapter, WIDTH)
