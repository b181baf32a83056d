"""One map of the names that FLUX.1's layers have in checkpoints and LoRA files.

This code uses Black Forest Labs' names (black-forest-labs/flux, src/flux/model.py). Others write:

  diffusers   transformer_blocks.0.attn.to_q      q, k, v (and a single block's MLP) in layers of their own;
                                                  norm_out.linear holds (scale, shift), BFL's (shift, scale)
  kohya       double_blocks_0_img_attn_qkv        any name with its dots written as underscores
  ComfyUI     ...img_attn.norm.query_norm.weight  since 0.33, instead of ...query_norm.scale
  trainers    double_blocks.0.img_attn.qkv.0      OneTrainer, XLabs and LyCORIS: parts of fused layers

`find_layer` maps a layer's name in any of them to BFL's. Prefixes that a file puts before all its names are
the caller's to remove.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .spec import FluxSpec

Rows = tuple[int, int]
"""First row of a weight and number of rows."""


@dataclass(frozen=True)
class LayerName:
    """A layer by BFL's name, and how the named tensor lies in it.

    `parts` are those of a fused layer that the tensor covers, None for the whole layer: 0 q, 1 k, 2 v, 3 the
    MLP's input. `swapped` says that the two halves of its rows are in the opposite order.
    """

    module: str
    parts: tuple[int, ...] | None = None
    swapped: bool = False

    def rows(self, spec: FluxSpec) -> Rows | None:
        """The rows of the weight that the named tensor covers, None for all."""
        if self.parts is None:
            return None
        sizes = [spec.hidden_size] * 3 + [spec.mlp_size]
        return sum(sizes[: self.parts[0]]), sum(sizes[part] for part in self.parts)


INPUT_LAYERS = (
    "img_in",
    "txt_in",
    "time_in.in_layer",
    "time_in.out_layer",
    "vector_in.in_layer",
    "vector_in.out_layer",
    "guidance_in.in_layer",
    "guidance_in.out_layer",
)
DOUBLE_LAYERS = (
    "img_mod.lin",
    "img_attn.qkv",
    "img_attn.norm.query_norm",
    "img_attn.norm.key_norm",
    "img_attn.proj",
    "img_mlp.0",
    "img_mlp.2",
    "txt_mod.lin",
    "txt_attn.qkv",
    "txt_attn.norm.query_norm",
    "txt_attn.norm.key_norm",
    "txt_attn.proj",
    "txt_mlp.0",
    "txt_mlp.2",
)
SINGLE_LAYERS = ("linear1", "linear2", "norm.query_norm", "norm.key_norm", "modulation.lin")
FINAL_LAYERS = ("final_layer.linear", "final_layer.adaLN_modulation.1")

FUSED = {"img_attn.qkv": 3, "txt_attn.qkv": 3, "linear1": 4}
"""Layers of a block that diffusers splits, and into how many."""

DIFFUSERS_OUTER = {
    "x_embedder": LayerName("img_in"),
    "context_embedder": LayerName("txt_in"),
    "time_text_embed.timestep_embedder.linear_1": LayerName("time_in.in_layer"),
    "time_text_embed.timestep_embedder.linear_2": LayerName("time_in.out_layer"),
    "time_text_embed.text_embedder.linear_1": LayerName("vector_in.in_layer"),
    "time_text_embed.text_embedder.linear_2": LayerName("vector_in.out_layer"),
    "time_text_embed.guidance_embedder.linear_1": LayerName("guidance_in.in_layer"),
    "time_text_embed.guidance_embedder.linear_2": LayerName("guidance_in.out_layer"),
    "norm_out.linear": LayerName("final_layer.adaLN_modulation.1", swapped=True),
    "proj_out": LayerName("final_layer.linear"),
}
DIFFUSERS_DOUBLE = {
    "norm1.linear": LayerName("img_mod.lin"),
    "norm1_context.linear": LayerName("txt_mod.lin"),
    "attn.to_q": LayerName("img_attn.qkv", (0,)),
    "attn.to_k": LayerName("img_attn.qkv", (1,)),
    "attn.to_v": LayerName("img_attn.qkv", (2,)),
    "attn.add_q_proj": LayerName("txt_attn.qkv", (0,)),
    "attn.add_k_proj": LayerName("txt_attn.qkv", (1,)),
    "attn.add_v_proj": LayerName("txt_attn.qkv", (2,)),
    "attn.norm_q": LayerName("img_attn.norm.query_norm"),
    "attn.norm_k": LayerName("img_attn.norm.key_norm"),
    "attn.norm_added_q": LayerName("txt_attn.norm.query_norm"),
    "attn.norm_added_k": LayerName("txt_attn.norm.key_norm"),
    "attn.to_out.0": LayerName("img_attn.proj"),
    "attn.to_add_out": LayerName("txt_attn.proj"),
    "ff.net.0.proj": LayerName("img_mlp.0"),
    "ff.net.2": LayerName("img_mlp.2"),
    "ff_context.net.0.proj": LayerName("txt_mlp.0"),
    "ff_context.net.2": LayerName("txt_mlp.2"),
    # what LyCORIS and some trainers write for the same layers
    "attn.to_out": LayerName("img_attn.proj"),
    "ff.linear_in": LayerName("img_mlp.0"),
    "ff.linear_out": LayerName("img_mlp.2"),
    "ff_context.linear_in": LayerName("txt_mlp.0"),
    "ff_context.linear_out": LayerName("txt_mlp.2"),
}
"""Layers of diffusers' FluxTransformerBlock (the inverse of its scripts/convert_flux_to_diffusers.py)."""

DIFFUSERS_SINGLE = {
    "norm.linear": LayerName("modulation.lin"),
    "attn.to_q": LayerName("linear1", (0,)),
    "attn.to_k": LayerName("linear1", (1,)),
    "attn.to_v": LayerName("linear1", (2,)),
    "proj_mlp": LayerName("linear1", (3,)),
    "attn.norm_q": LayerName("norm.query_norm"),
    "attn.norm_k": LayerName("norm.key_norm"),
    "proj_out": LayerName("linear2"),
}
TRAINERS_DOUBLE = {
    "processor.qkv_lora1": LayerName("img_attn.qkv"),  # XLabs
    "processor.qkv_lora2": LayerName("txt_attn.qkv"),
    "processor.proj_lora1": LayerName("img_attn.proj"),
    "processor.proj_lora2": LayerName("txt_attn.proj"),
    **{f"{qkv}.{i}": LayerName(qkv, (i,)) for qkv in ("img_attn.qkv", "txt_attn.qkv") for i in range(3)},
}
TRAINERS_SINGLE = {
    "processor.qkv_lora": LayerName("linear1", (0, 1, 2)),  # XLabs
    "processor.proj_lora": LayerName("linear2"),
    "linear1_qkv": LayerName("linear1", (0, 1, 2)),
    **{f"linear1.{i}": LayerName("linear1", (i,)) for i in range(4)},  # OneTrainer
}


def _underscored(*tables: dict[str, LayerName]) -> dict[str, LayerName]:
    return {name.replace(".", "_"): layer for table in tables for name, layer in table.items()}


def _own(names: tuple[str, ...]) -> dict[str, LayerName]:
    return {name: LayerName(name) for name in names}


_OUTER = _underscored(
    _own(INPUT_LAYERS + FINAL_LAYERS), DIFFUSERS_OUTER, {"img_in.proj": LayerName("img_in")}
)
_BLOCKS = {
    "double_blocks": ("double_blocks", _underscored(_own(DOUBLE_LAYERS), TRAINERS_DOUBLE)),
    "single_blocks": ("single_blocks", _underscored(_own(SINGLE_LAYERS), TRAINERS_SINGLE)),
    "transformer_blocks": ("double_blocks", _underscored(DIFFUSERS_DOUBLE)),
    "single_transformer_blocks": ("single_blocks", _underscored(DIFFUSERS_SINGLE)),
}
"""Layers of each kind of block by their underscored names, and BFL's name of that kind."""

_IN_BLOCK = re.compile(rf"({'|'.join(_BLOCKS)})[._](0|[1-9]\d{{0,3}})[._](.+)", re.ASCII)


def find_layer(name: str) -> LayerName | None:
    """The layer that a file's name for it means, in any known spelling; None where it means none.

    Dots and underscores count as the same, because kohya's format does not distinguish them and no two
    layers' names differ only in that. `name` has neither a prefix nor an ending such as `.weight`.

    >>> find_layer("transformer_blocks.3.attn.to_k")
    LayerName(module='double_blocks.3.img_attn.qkv', parts=(1,), swapped=False)
    """
    block = _IN_BLOCK.fullmatch(name)
    if block is None:
        return _OUTER.get(name.replace(".", "_"))
    kind, layers = _BLOCKS[block[1]]
    layer = layers.get(block[3].replace(".", "_"))
    if layer is None:
        return None
    return LayerName(f"{kind}.{block[2]}.{layer.module}", layer.parts, layer.swapped)


def layer_names(spec: FluxSpec) -> tuple[str, ...]:
    """BFL's names of the linear layers and norms of a transformer of these sizes, in the model's order."""
    return tuple(_layer_names(spec))


def _layer_names(spec: FluxSpec) -> Iterator[str]:
    yield from (name for name in INPUT_LAYERS if spec.guidance_embed or not name.startswith("guidance_in"))
    yield from (f"double_blocks.{i}.{name}" for i in range(spec.depth) for name in DOUBLE_LAYERS)
    yield from (f"single_blocks.{i}.{name}" for i in range(spec.depth_single) for name in SINGLE_LAYERS)
    yield from FINAL_LAYERS


def fused_parts(module: str) -> int:
    """Into how many layers diffusers splits a layer with this BFL name: 3 or 4, and 1 for an unsplit one."""
    return next((parts for name, parts in FUSED.items() if module.endswith(f".{name}")), 1)


def is_qk_norm(module: str) -> bool:
    """Whether a module with this BFL name is one of the norms of queries and keys."""
    return module.endswith((".query_norm", ".key_norm"))
