"""A LoRA of another model is refused by that model's name; keys are those of published files."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rectiflux.benchmarks.reference.models import SPEC, diffusers_state_dict, flux_transformer
from rectiflux.flux_core.lora import read_lora
from rectiflux.flux_core.model.spec import FLUX_DEV
from torch import Tensor

Key = str | tuple[str, int, int]


def tensors(*keys: Key) -> dict[str, Tensor]:
    """Tensors of these keys without memory, [4, 3072] unless a key comes with a shape."""
    named = [(key, 4, 3072) if isinstance(key, str) else key for key in keys]
    return {key: torch.empty(*shape, device="meta") for key, *shape in named}


KOHYA_TE = "text_model_encoder_layers_0_mlp_fc1.lora_down.weight"
KOHYA_UP = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
DOUBLE, SINGLE = "transformer.transformer_blocks", "transformer.single_transformer_blocks"
BFL = "diffusion_model.double_blocks.0"

FOREIGN: dict[str, tuple[str, tuple[Key, ...]]] = {
    "SDXL, kohya": (
        "a LoRA for SDXL",
        (
            f"lora_te1_{KOHYA_TE}",
            ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight", 8, 2048),
        ),
    ),
    "SD1.5, kohya": ("a LoRA for Stable Diffusion 1.5", (f"lora_te_{KOHYA_TE}", (KOHYA_UP, 8, 768))),
    "SD2, diffusers": (
        "a LoRA for Stable Diffusion 2",
        (("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.lora_A.weight", 4, 1024),),
    ),
    "a UNet without cross-attention": (
        "a LoRA for a Stable Diffusion UNet",
        (("lora_unet_up_blocks_1_resnets_0_conv1.lora_down.weight", 4, 320),),
    ),
    "SDXL's text encoders alone": ("a LoRA for SDXL", (f"lora_te2_{KOHYA_TE}",)),
    "SD3, kohya": (
        "a LoRA for Stable Diffusion 3",
        ("lora_unet_joint_blocks_0_context_block_attn_qkv.lora_down.weight",),
    ),
    "SD3, diffusers": ("a LoRA for Stable Diffusion 3", ((f"{DOUBLE}.0.attn.to_q.lora_A.weight", 4, 1536),)),
    "SD3.5 medium, its second attention": (
        "a LoRA for Stable Diffusion 3",
        (
            (f"{DOUBLE}.0.attn.to_q.lora_A.weight", 4, 1536),
            (f"{DOUBLE}.0.attn2.to_q.lora_A.weight", 4, 1536),
        ),
    ),
    "SD3.5 large, diffusers": (
        "a LoRA for Stable Diffusion 3.5",
        ((f"{DOUBLE}.0.attn.to_q.lora_A.weight", 4, 2432),),
    ),
    "FLUX.2, modulations": (
        "a LoRA for FLUX.2",
        ("diffusion_model.double_stream_modulation_img.lin.lora_A.weight",),
    ),
    "FLUX.2 dev, by width": ("a LoRA for FLUX.2", ((f"{BFL}.img_attn.qkv.lora_A.weight", 16, 6144),)),
    "FLUX.2 klein, by its gated MLP": (
        "a LoRA for FLUX.2",
        ((f"{BFL}.img_attn.qkv.lora_A.weight", 16, 3072), (f"{BFL}.img_mlp.0.lora_B.weight", 18432, 16)),
    ),
    "FLUX.2, by count": (
        "a LoRA for FLUX.2",
        (
            "diffusion_model.single_blocks.47.linear2.lora_A.weight",
            "diffusion_model.double_blocks.7.img_attn.proj.lora_A.weight",
        ),
    ),
    "FLUX.2, diffusers": ("a LoRA for FLUX.2", (f"{SINGLE}.0.attn.to_qkv_mlp_proj.lora_A.weight",)),
    "HunyuanVideo, by count": (
        "a LoRA for HunyuanVideo",
        tuple(f"lora_unet_double_blocks_{i}_img_attn_qkv.lora_down.weight" for i in (0, 19)),
    ),
    "HunyuanVideo, its names": ("a LoRA for HunyuanVideo", (f"{BFL}.img_attn_qkv.lora_A.weight",)),
    "HunyuanVideo, single blocks alone": (
        "a LoRA for HunyuanVideo",
        (f"{SINGLE}.39.attn.to_q.lora_A.weight", f"{DOUBLE}.18.attn.to_q.lora_A.weight"),
    ),
    "Qwen-Image, its names": ("a LoRA for Qwen-Image", (f"{DOUBLE}.0.img_mlp.net.0.proj.lora_A.weight",)),
    "Qwen-Image, attention alone": (
        "a LoRA for Qwen-Image",
        (f"{DOUBLE}.0.attn.to_q.lora_A.weight", f"{DOUBLE}.59.attn.to_q.lora_A.weight"),
    ),
    "Wan, original names": (
        "a LoRA for Wan",
        (("diffusion_model.blocks.0.cross_attn.k.lora_A.weight", 32, 5120),),
    ),
    "Wan, kohya": ("a LoRA for Wan", ("lora_unet_blocks_0_self_attn_q.lora_down.weight",)),
    "Wan, diffusers": ("a LoRA for Wan", ("transformer.blocks.0.attn2.to_k.lora_A.weight",)),
    "LTX-Video": (
        "a LoRA for LTX-Video, PixArt or Sana",
        ((f"{DOUBLE}.0.attn1.to_q.lora_A.weight", 4, 2048),),
    ),
    "Mochi": ("a LoRA for Mochi", ("diffusion_model.blocks.0.attn.qkv_x.lora_A.weight",)),
    "Z-Image": (
        "a LoRA for Lumina 2 or Z-Image",
        (("diffusion_model.layers.0.attention.to_q.lora_A.weight", 4, 3840),),
    ),
    "HiDream": (
        "a LoRA for HiDream",
        ("diffusion_model.double_stream_blocks.0.block.attn1.to_q.lora_A.weight",),
    ),
    "AuraFlow": ("a LoRA for AuraFlow", ("transformer.joint_transformer_blocks.0.attn.to_q.lora_A.weight",)),
    "Chroma": ("a LoRA for Chroma", ("diffusion_model.distilled_guidance_layer.in_proj.lora_A.weight",)),
    "IP-Adapter": (
        "an IP-Adapter",
        ("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight",),
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_another_models_lora_is_refused_by_name(name: str) -> None:
    what, keys = FOREIGN[name]
    with pytest.raises(ValueError, match=f"style.safetensors is {what}.*, not for FLUX.1"):
        read_lora(tensors(*keys), FLUX_DEV, name="style.safetensors")


def comfyui_state_dict() -> dict[str, Tensor]:
    """A whole transformer as ComfyUI saves it, with norms as `weight`."""
    return {key.replace(".scale", ".weight"): t for key, t in flux_transformer().state_dict().items()}


NOTHING: tuple[tuple[str, Callable[[], dict[str, Tensor]]], ...] = (
    ("a FLUX.1 transformer, no LoRA", lambda: dict(flux_transformer().state_dict())),
    ("a FLUX.1 transformer, no LoRA", comfyui_state_dict),
    ("a FLUX.1 transformer with diffusers' names", lambda: diffusers_state_dict(flux_transformer())),
    ("a LoRA for an unknown model", lambda: tensors("mystery.0.lora_A.weight")),
    ("no known kind of LoRA", lambda: tensors("mystery.weight")),
    ("no known kind of LoRA", dict),
)


@pytest.mark.parametrize(("what", "make"), NOTHING)
def test_a_file_without_a_key_of_flux_is_named(what: str, make: Callable[[], dict[str, Tensor]]) -> None:
    found = make()
    with pytest.raises(ValueError, match=f"no key of x.safetensors belongs to FLUX.1: it is {what}") as error:
        read_lora(found, SPEC, name="x.safetensors")
    assert not found or f"(its first key is {next(iter(found))})" in str(error.value)
