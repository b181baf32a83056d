"""Which layer a LoRA's name means: every trainer's spelling -> FLUX.1's own module, and which of its rows.

Names are compared with all dots as underscores, because kohya's file format writes them so and nothing else
can be undone without a doubt; no two layers of the transformer share such a name. diffusers cuts BFL's
fused layers (qkv in three, linear1 in four), so a name may mean some rows of a layer only. Its last
modulation holds (scale, shift) where BFL's holds (shift, scale).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from ..model.layers import RMSNorm
from ..model.spec import FluxSpec
from ..model.transformer import FluxTransformer

TRANSFORMER, CLIP, T5 = "transformer", "clip_l", "t5xxl"
"""The parts that a LoRA can change; the encoders' names are ComfyUI's."""

Rows = tuple[int, int]
"""First row of a weight and number of rows: the outputs that a piece of a fused layer makes."""


@dataclass(frozen=True)
class Target:
    """A module of one of the parts, some of its rows or (None) all, and whether their halves are swapped."""

    part: str
    module: str
    rows: Rows | None = None
    swapped: bool = False


DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_out": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "processor.proj_lora1": "img_attn.proj",  # XLabs
    "processor.proj_lora2": "txt_attn.proj",
    "processor.qkv_lora1": "img_attn.qkv",
    "processor.qkv_lora2": "txt_attn.qkv",
}
"""Other names for whole layers of a double block (diffusers FluxTransformerBlock; XLabs x-flux)."""

SINGLE = {
    "norm.linear": "modulation.lin",
    "proj_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "processor.proj_lora": "linear2",
}

OUTSIDE = {
    "x_embedder": "img_in",
    "img_in.proj": "img_in",  # OneTrainer
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "proj_out": "final_layer.linear",
}

IN_FRONT = re.compile(
    r"(?:base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|lora_transformer[._]|lora_unet[._]|"
    r"transformer\.|unet\.|lycoris_)+"
)
"""What may stand before a transformer's names."""

TEXT_IN_FRONT: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"lora_te1[._]", (CLIP,)),
    (r"lora_te2[._]", (T5,)),  # OneTrainer; SDXL's second CLIP has other names
    (r"lora_te3[._]", (T5,)),  # kohya, which counts as SD3 does
    (r"lora_te[._]", (CLIP, T5)),
    (r"(?:text_encoders\.)?clip_l\.", (CLIP,)),
    (r"(?:text_encoders\.)?(?:t5xxl|t5)\.", (T5,)),
    (r"text_encoder\.", (CLIP,)),
    (r"text_encoder_2\.", (T5,)),
)
_TEXT = tuple((re.compile(pattern), parts) for pattern, parts in TEXT_IN_FRONT)

_CLIP_LAYERS = (
    (r"encoder_layers_(\d+)_self_attn_([qkv]|out)_proj", r"encoder.layers.\1.self_attn.\2_proj"),
    (r"encoder_layers_(\d+)_mlp_(fc[12])", r"encoder.layers.\1.mlp.\2"),
    (r"encoder_layers_(\d+)_(layer_norm[12])", r"encoder.layers.\1.\2"),
    (r"final_layer_norm", r"final_layer_norm"),
)
_T5_LAYERS = (
    (r"encoder_block_(\d+)_layer_0_SelfAttention_([qkvo])", r"encoder.block.\1.layer.0.SelfAttention.\2"),
    (r"encoder_block_(\d+)_layer_1_DenseReluDense_(w\w+)", r"encoder.block.\1.layer.1.DenseReluDense.\2"),
    (r"encoder_block_(\d+)_layer_([01])_layer_norm", r"encoder.block.\1.layer.\2.layer_norm"),
    (r"encoder_final_layer_norm", r"encoder.final_layer_norm"),
)


def find_target(stem: str, spec: FluxSpec) -> Target | None:
    """What a file's name of a layer means in a model of these sizes, or None where it means nothing."""
    for front, parts in _TEXT:
        if match := front.match(stem):
            return _text_target(stem[match.end() :], parts)
    name = IN_FRONT.sub("", stem, count=1) if IN_FRONT.match(stem) else stem
    name = name.replace(".processor.to_", ".to_")
    return transformer_targets(spec).get(name.replace(".", "_").strip("_"))


def _text_target(name: str, parts: tuple[str, ...]) -> Target | None:
    """A layer of CLIP (without `text_model.` in front) or T5; how many there are the attaching finds out."""
    name = name.replace(".", "_").strip("_").removeprefix("transformer_").removeprefix("text_model_")
    for part in parts:
        for pattern, module in _CLIP_LAYERS if part == CLIP else _T5_LAYERS:
            if match := re.fullmatch(pattern, name):
                return Target(part, match.expand(module))
    return None


@lru_cache(maxsize=8)
def transformer_targets(spec: FluxSpec) -> Mapping[str, Target]:
    """Every known name of the transformer's layers, dots as underscores, by what it means."""
    found: dict[str, Target] = {}
    for name, target in _spellings(spec):
        found[name.replace(".", "_")] = target
    return found


@lru_cache(maxsize=8)
def transformer_modules(spec: FluxSpec) -> tuple[str, ...]:
    """Names of the transformer's linear layers and norms, in BFL's order."""
    with torch.device("meta"):
        model = FluxTransformer(spec)
    return tuple(name for name, module in model.named_modules() if isinstance(module, (nn.Linear, RMSNorm)))


def _spellings(spec: FluxSpec) -> Iterator[tuple[str, Target]]:
    modules = transformer_modules(spec)
    for module in modules:
        yield module, Target(TRANSFORMER, module)
    for theirs, ours in OUTSIDE.items():
        if ours in modules:
            yield theirs, Target(TRANSFORMER, ours)
    yield "norm_out.linear", Target(TRANSFORMER, "final_layer.adaLN_modulation.1", swapped=True)
    for i in range(spec.depth):
        for theirs, ours in DOUBLE.items():
            kind = "double_blocks" if theirs.startswith("processor") else "transformer_blocks"
            yield f"{kind}.{i}.{theirs}", Target(TRANSFORMER, f"double_blocks.{i}.{ours}")
        yield from _pieces(f"double_blocks.{i}.img_attn.qkv", f"transformer_blocks.{i}.attn", "to_{}", spec)
        yield from _pieces(
            f"double_blocks.{i}.txt_attn.qkv", f"transformer_blocks.{i}.attn", "add_{}_proj", spec
        )
    for i in range(spec.depth_single):
        fused, theirs_block = f"single_blocks.{i}.linear1", f"single_transformer_blocks.{i}"
        for theirs, ours in SINGLE.items():
            kind = f"single_blocks.{i}" if theirs.startswith("processor") else theirs_block
            yield f"{kind}.{theirs}", Target(TRANSFORMER, f"single_blocks.{i}.{ours}")
        yield from _pieces(fused, f"{theirs_block}.attn", "to_{}", spec)
        mlp = Target(TRANSFORMER, fused, (3 * spec.hidden_size, spec.mlp_size))
        yield f"{theirs_block}.proj_mlp", mlp
        yield f"{fused}.3", mlp  # OneTrainer
        qkv = Target(TRANSFORMER, fused, (0, 3 * spec.hidden_size))
        yield f"single_blocks.{i}.processor.qkv_lora", qkv  # XLabs
        yield f"{fused}_qkv", qkv


def _pieces(fused: str, block: str, pattern: str, spec: FluxSpec) -> Iterator[tuple[str, Target]]:
    """Queries, keys and values of a fused layer, by diffusers' names and by OneTrainer's numbers."""
    for i, letter in enumerate("qkv"):
        piece = Target(TRANSFORMER, fused, (i * spec.hidden_size, spec.hidden_size))
        yield f"{block}.{pattern.format(letter)}", piece
        yield f"{fused}.{i}", piece
