"""diffusers' names to Black Forest Labs', for FLUX.1's transformer and autoencoder.

The mapping is diffusers' own, read backwards (scripts/convert_flux_to_diffusers.py and
loaders/single_file_utils.py in huggingface/diffusers). Its traps: q, k and v are apart there and together
here, and with the MLP in a single block; the last modulation holds (scale, shift) there, (shift, scale) here;
attention in the autoencoder is by linear layers there, by 1x1 convolutions here, and the decoder's levels are
counted from the other end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..quant.formats import ConcatenatedWeight, DenseWeight, QuantizedWeight
from .checkpoint import Weight

OUTER = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
SINGLE = {
    "norm.linear": "modulation.lin",
    "proj_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
JOINED = {
    "transformer_blocks": {
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    },
    "single_transformer_blocks": {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")},
}
"""What lies apart in diffusers' blocks, by what it is here."""

BLOCK = re.compile(r"(transformer_blocks|single_transformer_blocks)\.(\d+)\.(.+)\.(weight|bias)")


def transformer_names(tensors: Mapping[str, Weight], file: str) -> dict[str, Weight]:
    """A transformer's weights under BFL's names; what is unknown keeps its name.

    Raises ValueError that names `file` when a part of a joined layer is missing.
    """
    result: dict[str, Weight] = {}
    apart: dict[tuple[str, str, str], dict[str, Weight]] = {}
    for name, tensor in tensors.items():
        stem, _, ending = name.rpartition(".")
        block = BLOCK.fullmatch(name)
        if block is None:
            new = f"{OUTER[stem]}.{ending}" if stem in OUTER else name
            result[new] = _swapped(tensor, name, file) if stem == "norm_out.linear" else tensor
            continue
        kind, index, part, ending = block.groups()
        joined = next((j for j, parts in JOINED[kind].items() if part in parts), None)
        if joined is not None:
            apart.setdefault((f"{kind}.{index}", joined, ending), {})[part] = tensor
            continue
        table = DOUBLE if kind == "transformer_blocks" else SINGLE
        ending = "scale" if "_norm" in table.get(part, "") else ending
        result[f"{_place(kind, index)}.{table[part]}.{ending}" if part in table else name] = tensor
    for (place, joined, ending), parts in apart.items():
        kind, index = place.split(".")
        wanted = JOINED[kind][joined]
        missing = next((part for part in wanted if part not in parts), None)
        if missing is not None:
            raise ValueError(f"{file} lacks {place}.{missing}.{ending}; it is incomplete, download it again")
        result[f"{_place(kind, index)}.{joined}.{ending}"] = join([parts[part] for part in wanted], file)
    return result


def _place(kind: str, index: str) -> str:
    return f"{'double' if kind == 'transformer_blocks' else 'single'}_blocks.{index}"


def join(parts: list[Weight], file: str) -> Weight:
    """Weights one below the other. A bias is copied, a weight stays where its parts are.

    Raises ValueError that names `file` when the parts are not equally wide.
    """
    if len({part.shape[1:] for part in parts}) > 1 or not all(
        part.ndim for part in parts if isinstance(part, Tensor)
    ):
        shapes = ", ".join(str([*part.shape]) for part in parts)
        raise ValueError(f"{file} is damaged: {shapes} belong in one layer; download it again")
    plain = [part for part in parts if isinstance(part, Tensor)]
    if len(plain) == len(parts) and plain[0].ndim < 2:
        return torch.cat(plain)
    return ConcatenatedWeight(
        tuple(DenseWeight(part) if isinstance(part, Tensor) else part for part in parts)
    )


def _swapped(tensor: Weight, name: str, file: str) -> Weight:
    """The lower half above the upper."""
    rows = tensor.shape[0] if len(tensor.shape) else 1
    if rows % 2:
        raise ValueError(
            f"{file} is damaged: {name} has {rows} rows, which have no halves; download it again"
        )
    if isinstance(tensor, QuantizedWeight):
        return ConcatenatedWeight((tensor.rows(rows // 2, rows), tensor.rows(0, rows // 2)))
    return join([tensor[rows // 2 :], tensor[: rows // 2]], file)


VAE_RENAMED = (
    (re.compile(r"\.mid_block\.resnets\.0\."), ".mid.block_1."),
    (re.compile(r"\.mid_block\.resnets\.1\."), ".mid.block_2."),
    (re.compile(r"\.mid_block\.attentions\.0\.group_norm\."), ".mid.attn_1.norm."),
    (re.compile(r"\.mid_block\.attentions\.0\.(?:to_q|query)\."), ".mid.attn_1.q."),
    (re.compile(r"\.mid_block\.attentions\.0\.(?:to_k|key)\."), ".mid.attn_1.k."),
    (re.compile(r"\.mid_block\.attentions\.0\.(?:to_v|value)\."), ".mid.attn_1.v."),
    (re.compile(r"\.mid_block\.attentions\.0\.(?:to_out\.0|proj_attn)\."), ".mid.attn_1.proj_out."),
    (re.compile(r"\.conv_norm_out\."), ".norm_out."),
    (re.compile(r"\.conv_shortcut\."), ".nin_shortcut."),
    (re.compile(r"\.downsamplers\.0\."), ".downsample."),
    (re.compile(r"\.upsamplers\.0\."), ".upsample."),
    (re.compile(r"^encoder\.down_blocks\."), "encoder.down."),
    (re.compile(r"\.resnets\."), ".block."),
)
UP = re.compile(r"^decoder\.up_blocks\.(\d+)\.")


def autoencoder_names(tensors: Mapping[str, Weight]) -> dict[str, Weight]:
    """An autoencoder's weights under BFL's names; what is unknown keeps its name."""
    numbers = [int(match[1]) for name in tensors if (match := UP.match(name))]
    last = max(numbers, default=0)
    result: dict[str, Weight] = {}
    for name, tensor in tensors.items():
        new = UP.sub(lambda match: f"decoder.up.{last - int(match[1])}.", name)
        for pattern, ours in VAE_RENAMED:
            new = pattern.sub(ours, new)
        convolved = ".attn_1." in new and isinstance(tensor, Tensor) and tensor.ndim == 2
        result[new] = tensor[:, :, None, None] if convolved and isinstance(tensor, Tensor) else tensor
    return result
