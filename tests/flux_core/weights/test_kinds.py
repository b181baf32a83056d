"""Files are called by their names, told by keys taken from files that are in circulation."""

from __future__ import annotations

import pytest
import torch
from rectiflux.benchmarks.reference.models import (
    autoencoder,
    diffusers_autoencoder,
    diffusers_state_dict,
    flux_transformer,
)
from rectiflux.benchmarks.reference.text import clip_model, t5_model
from rectiflux.flux_core.weights import kind_of
from rectiflux.flux_core.weights.kinds import AUTOENCODER, CLIP, T5, TRANSFORMER, Kind, expect

CIRCULATING = {
    "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": "a LoRA",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": "a LoRA",
    "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": "a LoRA",
    "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": "a LoRA",
    "transformer.single_transformer_blocks.0.proj_out.lora_A.weight": "a LoRA",
    "double_blocks.0.processor.qkv_lora1.down.weight": "a LoRA",
    "lycoris_transformer_blocks_0_attn_to_q.lokr_w1": "a LoRA",
    "controlnet_blocks.0.weight": "a ControlNet",
    "control_model.input_hint_block.0.weight": "a ControlNet",
    "distilled_guidance_layer.in_proj.weight": "a Chroma transformer",
    "double_stream_modulation_img.lin.weight": "a FLUX.2 transformer",
    "txt_in.individual_token_refiner.blocks.0.norm1.weight": "a HunyuanVideo transformer",
    "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": "a FLUX.1 transformer",
    "single_transformer_blocks.0.proj_out.weight": "a FLUX.1 transformer with diffusers' names",
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": "an SD3 transformer",
    "model.diffusion_model.label_emb.0.0.weight": "an SDXL UNet",
    "add_embedding.linear_1.weight": "an SDXL UNet",
    "model.diffusion_model.input_blocks.1.0.in_layers.0.weight": "an SD1.5 or SD2 UNet",
    "down_blocks.0.resnets.0.conv1.weight": "an SD1.5 or SD2 UNet",
    "first_stage_model.encoder.down.0.block.0.conv1.weight": "a VAE",
    "encoder.down_blocks.0.resnets.0.conv1.weight": "a VAE with diffusers' names",
    "encoder.block.0.layer.0.SelfAttention.q.weight": "a T5 text encoder",
    "text_model.embeddings.token_embedding.weight": "a CLIP text encoder",
    "vision_model.embeddings.patch_embedding.weight": "a CLIP vision model",
    "transformer.resblocks.0.attn.in_proj_weight": "an OpenCLIP text encoder",
    "conv_first.weight": "of an unknown kind",
    "lora_transformer_transformer_blocks_0_attn_to_q.dora_scale": "a LoRA",
    "transformer_blocks.0.attn.to_q.oft_blocks": "a LoRA",
    "diffusion_model.img_in.diff": "a LoRA",
    "ip_adapter_proj_model.proj.weight": "an IP-Adapter",
    "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": "an IP-Adapter",
    "redux_up.weight": "a FLUX.1 Redux adapter",
    "pulid_ca.0.norm1.weight": "a PuLID adapter",
    "controlnet_x_embedder.weight": "a ControlNet",
    "emb_params": "a textual inversion",
    "clip_l": "a textual inversion",
    "transformer_blocks.0.norm1_context.linear.weight": "an SD3 transformer",
    "transformer_blocks.0.img_mod.1.weight": "a Qwen-Image transformer",
    "model.diffusion_model.blocks.0.cross_attn.norm_q.weight": "a Wan transformer",
    "noise_refiner.0.attention.qkv.weight": "a Lumina or Z-Image transformer",
    "double_stream_blocks.0.block.attn1.to_q.weight": "a HiDream transformer",
    "double_layers.0.attn.w1q.weight": "an AuraFlow transformer",
    "transformer_blocks.0.scale_shift_table": "an LTX-Video transformer",
    "t_block.1.weight": "a PixArt transformer",
    "enc.blk.0.attn_q.weight": "a T5 text encoder with llama.cpp's names",
    "blk.0.attn_q.weight": "a language model",
    "model.layers.0.self_attn.q_proj.weight": "a language model",
    "model.1.sub.0.RDB1.conv1.0.weight": "an upscaler",
}


@pytest.mark.parametrize(("key", "kind"), CIRCULATING.items())
def test_kind_by_key(key: str, kind: str) -> None:
    """Whatever else the file holds."""
    assert kind_of({"position_ids": torch.zeros(1), key: torch.zeros(1)}) == kind


def test_add_ons_go_before_the_models_whose_names_they_repeat() -> None:
    keys = ["double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.in_proj.weight"]
    assert kind_of({key: torch.zeros(1) for key in keys}) == "a Chroma transformer"
    keys = ["double_blocks.0.img_attn.norm.query_norm.scale", "double_blocks.0.img_attn.qkv.lora_A.weight"]
    assert kind_of({key: torch.zeros(1) for key in keys}) == "a LoRA"


def test_whole_models() -> None:
    transformer, vae = flux_transformer(), autoencoder()
    assert kind_of(transformer.state_dict()) == TRANSFORMER.name
    assert kind_of(diffusers_state_dict(transformer)) == "a FLUX.1 transformer with diffusers' names"
    assert kind_of(vae.state_dict()) == AUTOENCODER.name
    assert kind_of(diffusers_autoencoder(vae).state_dict()) == "a VAE with diffusers' names"
    assert kind_of(t5_model().state_dict()) == T5.name
    assert kind_of(clip_model().state_dict()) == CLIP.name
    assert kind_of({}) == "of an unknown kind"


@pytest.mark.parametrize("kind", [TRANSFORMER, AUTOENCODER, T5, CLIP])
def test_refusals_name_both(kind: Kind) -> None:
    lora = {"lora_unet_single_blocks_0_linear1.alpha": torch.zeros(1)}
    with pytest.raises(
        ValueError,
        match=f"^style.safetensors is a LoRA, not {kind.name}; use the LoRA node for it, and choose",
    ):
        expect(lora, kind, "style.safetensors")
    with pytest.raises(ValueError, match=f"^x is an SDXL UNet, not {kind.name}; choose {kind.name} here$"):
        expect({"label_emb.0.0.weight": torch.zeros(1)}, kind, "x")
