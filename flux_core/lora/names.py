"""Which module a LoRA's layer name means, in the transformer or a text encoder, and which of its rows.

The transformer's names are those of flux_core/model/names.py; prefixes are in conventions.py. diffusers
splits BFL's fused layers (qkv in three, linear1 in four), so a name may mean some rows of a layer only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from ..model.names import Rows, find_layer, layer_names
from ..model.spec import FluxSpec
from .conventions import CLIP, PREFIX, TEXT_PREFIXES, TRANSFORMER

__all__ = ["Rows", "Target", "find_target", "transformer_modules"]


@dataclass(frozen=True)
class Target:
    """A module of one of the parts, some of its rows or (None) all, and whether their halves are swapped."""

    part: str
    module: str
    rows: Rows | None = None
    swapped: bool = False


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
    for prefix, parts in TEXT_PREFIXES:
        if match := prefix.match(stem):
            return _text_target(stem[match.end() :], parts)
    name = PREFIX.sub("", stem, count=1) if PREFIX.match(stem) else stem
    layer = find_layer(name.replace(".processor.to_", ".to_").strip("_."))
    if layer is None or layer.module not in _modules(spec):
        return None
    return Target(TRANSFORMER, layer.module, layer.rows(spec), layer.swapped)


def _text_target(name: str, parts: tuple[str, ...]) -> Target | None:
    """A layer of CLIP (without `text_model.` in front) or T5; how many there are the attaching finds out."""
    name = name.replace(".", "_").strip("_").removeprefix("transformer_").removeprefix("text_model_")
    for part in parts:
        for pattern, module in _CLIP_LAYERS if part == CLIP else _T5_LAYERS:
            if match := re.fullmatch(pattern, name):
                return Target(part, match.expand(module))
    return None


def transformer_modules(spec: FluxSpec) -> tuple[str, ...]:
    """Names of the transformer's linear layers and norms, in BFL's order."""
    return layer_names(spec)


@lru_cache(maxsize=8)
def _modules(spec: FluxSpec) -> frozenset[str]:
    return frozenset(layer_names(spec))
