"""Small models with random weights, and the same weights under diffusers' names.

The mapping is that of diffusers' converter (scripts/convert_flux_to_diffusers.py): qkv splits in three,
linear1 in four, and the last modulation holds (scale, shift) there and (shift, scale) here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...flux_core.model.autoencoder import SCALE, SHIFT, AutoEncoder, AutoEncoderSpec
from ...flux_core.model.spec import Conditioning, FluxSpec
from ...flux_core.model.transformer import FluxTransformer, position_ids

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel

SPEC = FluxSpec(64, 2, 2, 3, context_in=24, vec_in=20, guidance_embed=True)
AE_SPEC = AutoEncoderSpec(ch=8, ch_mult=(1, 2, 2, 2), num_res_blocks=2)

EMBEDDERS = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}
PLAIN = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
SINGLE = {
    "modulation.lin": "norm.linear",
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
SPLIT = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Random parameters as large as a trained network's; zeros and ones could hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                norm = name.endswith("scale") or ("norm" in name and name.endswith("weight"))
                parameter.copy_(0.2 * noise + (1.0 if norm else 0.0))


def flux_transformer(seed: int = 0, **sizes: object) -> FluxTransformer:
    """Our transformer with random weights and SPEC's sizes unless others are given."""
    model = FluxTransformer(replace(SPEC, **sizes)).eval().requires_grad_(False)
    randomize(model, seed)
    return model


def autoencoder(seed: int = 1) -> AutoEncoder:
    """Our autoencoder with random weights and AE_SPEC's sizes."""
    model = AutoEncoder(AE_SPEC).eval().requires_grad_(False)
    randomize(model, seed)
    return model


def text(seed: int, *, rows: int = 1, length: int = 5, guidance: float | None = 3.5) -> Conditioning:
    """A random conditioning for a model of SPEC's sizes."""
    generator = torch.Generator().manual_seed(seed)
    txt = torch.randn(rows, length, SPEC.context_in, generator=generator)
    return Conditioning(txt, torch.randn(rows, SPEC.vec_in, generator=generator), guidance)


def _renamed(name: str) -> tuple[str, ...]:
    """diffusers' names for one of ours, all without .weight, .bias or .scale."""
    part, _, rest = name.partition(".")
    if part in EMBEDDERS:
        return (f"time_text_embed.{EMBEDDERS[part]}.linear_{1 if rest == 'in_layer' else 2}",)
    if name in PLAIN:
        return (PLAIN[name],)
    if name == "final_layer.adaLN_modulation.1":
        return ("norm_out.linear",)
    index, _, rest = rest.partition(".")
    prefix = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}[part]
    table = DOUBLE if part == "double_blocks" else SINGLE
    names = SPLIT[rest] if rest in SPLIT else (table[rest],)
    return tuple(f"{prefix}.{index}.{new}" for new in names)


def diffusers_state_dict(model: FluxTransformer) -> dict[str, Tensor]:
    """The transformer's weights under diffusers' names."""
    hidden, mlp = model.spec.hidden_size, model.spec.mlp_size
    result: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        stem, _, ending = name.rpartition(".")
        names = _renamed(stem)
        if names == ("norm_out.linear",):
            shift, scale = tensor.chunk(2)
            tensor = torch.cat([scale, shift])
        parts = tensor.split([hidden] * 3 + [mlp] * (len(names) - 3)) if len(names) > 1 else (tensor,)
        for new, part in zip(names, parts, strict=True):
            result[f"{new}.{'weight' if ending == 'scale' else ending}"] = part.clone()
    return result


def diffusers_of_size(spec: FluxSpec) -> FluxTransformer2DModel:
    """diffusers' transformer with these sizes and its default weights."""
    from diffusers import FluxTransformer2DModel  # here, because this import takes seconds

    model = FluxTransformer2DModel(
        in_channels=spec.in_channels,
        out_channels=spec.out_channels,
        num_layers=spec.depth,
        num_single_layers=spec.depth_single,
        attention_head_dim=spec.head_dim,
        num_attention_heads=spec.num_heads,
        joint_attention_dim=spec.context_in,
        pooled_projection_dim=spec.vec_in,
        guidance_embeds=spec.guidance_embed,
        axes_dims_rope=spec.axes_dim,
    )
    return model.eval().requires_grad_(False)


def diffusers_transformer(model: FluxTransformer) -> FluxTransformer2DModel:
    """diffusers' transformer with our weights."""
    reference = diffusers_of_size(model.spec)
    reference.load_state_dict(diffusers_state_dict(model))
    return reference


def diffusers_velocity(
    reference: FluxTransformer2DModel, tokens: Tensor, prompt: Conditioning, sigma: float, h: int, w: int
) -> Tensor:
    """diffusers' velocity for tokens of an h x w latent, computed in the dtype of its model."""
    length, batch, dtype = prompt.txt.shape[1], tokens.shape[0], reference.dtype
    ids = position_ids(length, h, w)
    with torch.no_grad():
        return reference(
            hidden_states=tokens.to(dtype),
            encoder_hidden_states=prompt.txt.to(dtype),
            pooled_projections=prompt.pooled.to(dtype),
            timestep=torch.full((batch,), sigma, dtype=dtype),
            guidance=None if prompt.guidance is None else torch.full((batch,), prompt.guidance),
            txt_ids=ids[:length],
            img_ids=ids[length:],
        ).sample


def diffusers_pipeline(
    transformer: FluxTransformer2DModel,
    autoencoder: AutoencoderKL,
    shifted: bool = True,
    kind: str = "FluxPipeline",
) -> FluxPipeline:
    """diffusers' pipeline of a kind for encoded prompts; `shifted` like [dev]'s, else like [schnell]'s."""
    import diffusers
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipeline = getattr(diffusers, kind)(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=shifted),
        vae=autoencoder,
        transformer=transformer,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def diffusers_autoencoder(model: AutoEncoder) -> AutoencoderKL:
    """diffusers' autoencoder with our weights."""
    from diffusers import AutoencoderKL

    spec = model.spec
    levels = len(spec.ch_mult)
    reference = AutoencoderKL(
        in_channels=spec.in_channels,
        out_channels=spec.in_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(spec.ch * m for m in spec.ch_mult),
        layers_per_block=spec.num_res_blocks,
        latent_channels=spec.z_channels,
        norm_num_groups=spec.groups,
        scaling_factor=SCALE,
        shift_factor=SHIFT,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    reference.load_state_dict(
        {_vae_name(n, levels): _vae_tensor(n, t) for n, t in model.state_dict().items()}
    )
    return reference.eval().requires_grad_(False)


VAE_PARTS = (
    (".nin_shortcut.", ".conv_shortcut."),
    (".mid.block_1.", ".mid_block.resnets.0."),
    (".mid.block_2.", ".mid_block.resnets.1."),
    (".mid.attn_1.norm.", ".mid_block.attentions.0.group_norm."),
    (".mid.attn_1.q.", ".mid_block.attentions.0.to_q."),
    (".mid.attn_1.k.", ".mid_block.attentions.0.to_k."),
    (".mid.attn_1.v.", ".mid_block.attentions.0.to_v."),
    (".mid.attn_1.proj_out.", ".mid_block.attentions.0.to_out.0."),
    ("encoder.norm_out.", "encoder.conv_norm_out."),
    ("decoder.norm_out.", "decoder.conv_norm_out."),
    (".downsample.conv.", ".downsamplers.0.conv."),
    (".upsample.conv.", ".upsamplers.0.conv."),
    (".block.", ".resnets."),
)


def _vae_name(name: str, levels: int) -> str:
    """diffusers' name of one of our autoencoder's tensors; its decoder counts levels from the latent up."""
    for ours, theirs in VAE_PARTS:
        name = name.replace(ours, theirs)
    parts = name.split(".")
    if parts[1] == "down":
        parts[1] = "down_blocks"
    elif parts[1] == "up":
        parts[1:3] = ["up_blocks", str(levels - 1 - int(parts[2]))]
    return ".".join(parts)


def _vae_tensor(name: str, tensor: Tensor) -> Tensor:
    """Attention uses 1x1 convolutions here and linear layers there."""
    return tensor[:, :, 0, 0] if ".attn_1." in name and tensor.ndim == 4 else tensor


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Largest difference over the reference's largest magnitude."""
    return float((ours - reference).abs().max() / reference.abs().max())
