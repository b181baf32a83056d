"""llama.cpp's names of T5's tensors (ggml-org/llama.cpp, gguf-py/gguf/tensor_mapping.py) to transformers'."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .weight_file import Weight

OUTER = {
    "token_embd.weight": "shared.weight",
    "enc.output_norm.weight": "encoder.final_layer_norm.weight",
}
BLOCK = re.compile(r"enc\.blk\.(\d+)\.(.+)\.weight")
LAYERS = {
    "attn_q": "0.SelfAttention.q",
    "attn_k": "0.SelfAttention.k",
    "attn_v": "0.SelfAttention.v",
    "attn_o": "0.SelfAttention.o",
    "attn_rel_b": "0.SelfAttention.relative_attention_bias",
    "attn_norm": "0.layer_norm",
    "ffn_gate": "1.DenseReluDense.wi_0",
    "ffn_up": "1.DenseReluDense.wi_1",
    "ffn_down": "1.DenseReluDense.wo",
    "ffn_norm": "1.layer_norm",
}
UNUSED = re.compile(r"dec\.(blk\.\d+\.\w+|output_norm)\.(weight|bias)|output\.weight")
"""The decoder and the output head, which FLUX.1 does not use."""


def t5_names(tensors: Mapping[str, Weight]) -> dict[str, Weight]:
    """A T5 encoder's weights under transformers' names, without the decoder; unknown names are kept."""
    result: dict[str, Weight] = {}
    for name, tensor in tensors.items():
        if UNUSED.fullmatch(name):
            continue
        block = BLOCK.fullmatch(name)
        if block is not None and block[2] in LAYERS:
            name = f"encoder.block.{block[1]}.layer.{LAYERS[block[2]]}.weight"
        result[OUTER.get(name, name)] = tensor
    return result
