"""Kinds of models, detected from keys of files in circulation."""

from __future__ import annotations

import pytest
from rectiflux.benchmarks.reference.models import (
    autoencoder,
    diffusers_autoencoder,
    diffusers_state_dict,
    flux_transformer,
)
from rectiflux.benchmarks.reference.text import clip_model, t5_model
from rectiflux.flux_core.weights import ModelKind, kind_of

CIRCULATING = {
    ModelKind.LORA: [
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
        "transformer.single_transformer_blocks.0.proj_out.lora_A.weight",
        "double_blocks.0.processor.qkv_lora1.down.weight",
        "lycoris_transformer_blocks_0_attn_to_q.lokr_w1",
        "lora_transformer_transformer_blocks_0_attn_to_q.dora_scale",
        "transformer_blocks.0.attn.to_q.oft_blocks",
        "diffusion_model.img_in.diff",
    ],
    ModelKind.IP_ADAPTER: [
        "ip_adapter_proj_model.proj.weight",
        "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight",
    ],
    ModelKind.REDUX: ["redux_up.weight"],
    ModelKind.PULID: ["pulid_ca.0.norm1.weight"],
    ModelKind.CONTROLNET: [
        "controlnet_blocks.0.weight",
        "controlnet_x_embedder.weight",
        "control_model.input_hint_block.0.weight",
    ],
    ModelKind.TEXTUAL_INVERSION: ["emb_params", "clip_l"],
    ModelKind.CHROMA: ["distilled_guidance_layer.in_proj.weight"],
    ModelKind.FLUX_2: ["double_stream_modulation_img.lin.weight"],
    ModelKind.HUNYUAN_VIDEO: ["txt_in.individual_token_refiner.blocks.0.norm1.weight"],
    ModelKind.TRANSFORMER: ["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"],
    ModelKind.DIFFUSERS_TRANSFORMER: ["single_transformer_blocks.0.proj_out.weight"],
    ModelKind.SD3: [
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
        "transformer_blocks.0.norm1_context.linear.weight",
    ],
    ModelKind.QWEN_IMAGE: ["transformer_blocks.0.img_mod.1.weight"],
    ModelKind.WAN: ["model.diffusion_model.blocks.0.cross_attn.norm_q.weight"],
    ModelKind.LUMINA: ["noise_refiner.0.attention.qkv.weight"],
    ModelKind.HIDREAM: ["double_stream_blocks.0.block.attn1.to_q.weight"],
    ModelKind.AURAFLOW: ["double_layers.0.attn.w1q.weight"],
    ModelKind.LTX_VIDEO: ["transformer_blocks.0.scale_shift_table"],
    ModelKind.PIXART: ["t_block.1.weight"],
    ModelKind.SDXL: ["model.diffusion_model.label_emb.0.0.weight", "add_embedding.linear_1.weight"],
    ModelKind.SD1: [
        "model.diffusion_model.input_blocks.1.0.in_layers.0.weight",
        "down_blocks.0.resnets.0.conv1.weight",
    ],
    ModelKind.T5: ["encoder.block.0.layer.0.SelfAttention.q.weight"],
    ModelKind.UMT5: [
        "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
        "enc.blk.1.attn_rel_b.weight",
    ],
    ModelKind.LLAMA_CPP_T5: ["enc.blk.0.attn_q.weight"],
    ModelKind.VAE: ["first_stage_model.encoder.down.0.block.0.conv1.weight"],
    ModelKind.DIFFUSERS_VAE: ["encoder.down_blocks.0.resnets.0.conv1.weight"],
    ModelKind.CLIP: ["text_model.embeddings.token_embedding.weight"],
    ModelKind.SIGLIP: ["vision_model.head.probe"],
    ModelKind.CLIP_VISION: ["vision_model.embeddings.patch_embedding.weight"],
    ModelKind.OPEN_CLIP: ["transformer.resblocks.0.attn.in_proj_weight"],
    ModelKind.LANGUAGE_MODEL: ["blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight"],
    ModelKind.UPSCALER: ["model.1.sub.0.RDB1.conv1.0.weight"],
    ModelKind.UNKNOWN: ["conv_first.weight"],
}


@pytest.mark.parametrize("kind", ModelKind, ids=lambda kind: kind.name)
def test_kind_by_one_key(kind: ModelKind) -> None:
    """Whatever else the file holds."""
    assert {kind_of(["position_ids", key]) for key in CIRCULATING[kind]} == {kind}


def test_add_ons_precede_the_models_whose_names_they_repeat() -> None:
    flux = "double_blocks.0.img_attn.qkv.weight"
    assert kind_of([flux, "distilled_guidance_layer.in_proj.weight"]) is ModelKind.CHROMA
    assert kind_of([flux, "double_blocks.0.img_attn.qkv.lora_A.weight"]) is ModelKind.LORA


def test_whole_models() -> None:
    transformer, vae = flux_transformer(), autoencoder()
    assert kind_of(transformer.state_dict()) is ModelKind.TRANSFORMER
    assert kind_of(diffusers_state_dict(transformer)) is ModelKind.DIFFUSERS_TRANSFORMER
    assert kind_of(vae.state_dict()) is ModelKind.VAE
    assert kind_of(diffusers_autoencoder(vae).state_dict()) is ModelKind.DIFFUSERS_VAE
    assert kind_of(t5_model().state_dict()) is ModelKind.T5
    assert kind_of(clip_model().state_dict()) is ModelKind.CLIP
    assert kind_of({}) is ModelKind.UNKNOWN


def test_spellings_are_one_model() -> None:
    assert ModelKind.DIFFUSERS_VAE.model is ModelKind.VAE.model is ModelKind.VAE
    assert ModelKind.LORA.label == "a LoRA"
