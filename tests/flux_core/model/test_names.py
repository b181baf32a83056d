"""The map of names: BFL's against the model itself, every other spelling against the module that it means."""

import pytest
import torch
from rectiflux.flux_core.model.layers import RMSNorm
from rectiflux.flux_core.model.names import LayerName, find_layer, fused_parts, layer_names
from rectiflux.flux_core.model.spec import FLUX_DEV, FLUX_SCHNELL, FluxSpec
from rectiflux.flux_core.model.transformer import FluxTransformer
from torch import nn

SMALL = FluxSpec(64, 2, 2, 3, context_in=32, vec_in=16, guidance_embed=True)


def test_layer_names_are_the_model_s_own() -> None:
    with torch.device("meta"):
        model = FluxTransformer(SMALL)
    layers = tuple(n for n, module in model.named_modules() if isinstance(module, (nn.Linear, RMSNorm)))
    assert layer_names(SMALL) == layers
    assert len(layer_names(FLUX_DEV)) == len(layer_names(FLUX_SCHNELL)) + 2 == 466


def test_own_names_are_found_with_dots_and_with_kohya_s_underscores() -> None:
    for name in layer_names(FLUX_DEV):
        assert find_layer(name) == find_layer(name.replace(".", "_")) == LayerName(name)


@pytest.mark.parametrize(
    ("name", "module", "rows"),
    [
        ("x_embedder", "img_in", None),
        ("transformer_blocks.1.attn.to_k", "double_blocks.1.img_attn.qkv", (64, 64)),
        ("transformer_blocks_1_attn_add_v_proj", "double_blocks.1.txt_attn.qkv", (128, 64)),
        ("single_transformer_blocks.2.proj_mlp", "single_blocks.2.linear1", (192, 256)),
        ("single_transformer_blocks.2.proj_out", "single_blocks.2.linear2", None),
        ("double_blocks.0.img_attn.qkv.2", "double_blocks.0.img_attn.qkv", (128, 64)),
        ("single_blocks.0.processor.qkv_lora", "single_blocks.0.linear1", (0, 192)),
    ],
)
def test_other_spellings(name: str, module: str, rows: tuple[int, int] | None) -> None:
    layer = find_layer(name)
    assert layer is not None and not layer.swapped
    assert (layer.module, layer.rows(SMALL)) == (module, rows)


def test_the_last_modulation_of_diffusers_is_swapped() -> None:
    assert find_layer("norm_out.linear") == LayerName("final_layer.adaLN_modulation.1", swapped=True)


@pytest.mark.parametrize(
    "name", ["", "img_attn.qkv", "double_blocks.0", "double_blocks.00.img_mlp.0", "proj"]
)
def test_unknown_names(name: str) -> None:
    assert find_layer(name) is None


def test_fused_parts() -> None:
    assert fused_parts("double_blocks.0.txt_attn.qkv") == 3
    assert fused_parts("single_blocks.5.linear1") == 4
    assert fused_parts("single_blocks.5.linear2") == fused_parts("img_in") == 1
