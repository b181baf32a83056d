"""Tensor names of FLUX.1's transformer and autoencoder in other spellings to Black Forest Labs'.

Transformers: the map of names is model/names.py. Fused layers are joined here, which diffusers splits into q,
k, v and MLP, and the halves of the last modulation swapped. Autoencoders: diffusers' attention consists of
linear layers, BFL's of 1x1 convolutions, and the decoder's levels are counted from the other end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..model.names import LayerName, find_layer, fused_parts, is_qk_norm
from ..quant.formats import ConcatenatedWeight, DenseWeight, QuantizedWeight
from .weight_file import Weight

PART_LABELS = ("q", "k", "v", "MLP")
"""The parts of a fused layer, in the order of its rows."""


def transformer_names(tensors: Mapping[str, Weight], file: str) -> dict[str, Weight]:
    """A transformer's weights under BFL's names, from BFL's, diffusers' or ComfyUI's; unknown names are kept.

    Raises ValueError that names `file` when a part of a fused layer is missing or has another width, and when
    two names mean the same weight.
    """
    found: dict[str, dict[int | None, Weight]] = {}  # by BFL's name and part; None is a whole weight
    for name, tensor in tensors.items():
        new, layer = _bfl_name(name)
        part = layer.parts[0] if layer is not None and layer.parts else None
        parts = found.setdefault(new, {})
        if part in parts or None in parts or (parts and part is None):
            raise ValueError(f"{file} holds {new} twice, also as {name}; choose an unmodified model")
        parts[part] = _swapped(tensor, name, file) if layer is not None and layer.swapped else tensor
    return {
        name: parts[None] if None in parts else _fused(name, parts, file) for name, parts in found.items()
    }


def _bfl_name(name: str) -> tuple[str, LayerName | None]:
    """A parameter's name as BFL has it and the layer that it belongs to; an unknown name and None."""
    stem, _, ending = name.rpartition(".")
    layer = find_layer(stem) if ending in ("weight", "bias", "scale") else None
    if layer is None:
        return name, None
    return f"{layer.module}.{'scale' if is_qk_norm(layer.module) else ending}", layer


def _fused(name: str, parts: Mapping[int | None, Weight], file: str) -> Weight:
    """The weight or bias of a fused layer from all its parts."""
    wanted = range(fused_parts(name.rpartition(".")[0]))
    missing = next((part for part in wanted if part not in parts), None)
    if missing is not None:
        label = PART_LABELS[missing]
        raise ValueError(f"{file} lacks the {label} part of {name}; choose a file of the whole model")
    return join([parts[part] for part in wanted], file)


def join(parts: list[Weight], file: str) -> Weight:
    """Weights concatenated along their rows. A bias is copied, a weight keeps referring to its parts.

    Raises ValueError that names `file` when the parts have different widths.
    """
    if len({part.shape[1:] for part in parts}) > 1 or not all(
        part.ndim for part in parts if isinstance(part, Tensor)
    ):
        shapes = ", ".join(str([*part.shape]) for part in parts)
        raise ValueError(
            f"{file} has shapes {shapes} in one layer, which must have one width; choose an unmodified model"
        )
    plain = [part for part in parts if isinstance(part, Tensor)]
    if len(plain) == len(parts) and plain[0].ndim < 2:
        return torch.cat(plain)
    return ConcatenatedWeight(
        tuple(DenseWeight(part) if isinstance(part, Tensor) else part for part in parts)
    )


def _swapped(tensor: Weight, name: str, file: str) -> Weight:
    """The second half of the rows, then the first: (scale, shift) to (shift, scale)."""
    rows = tensor.shape[0] if len(tensor.shape) else 1
    if rows % 2:
        raise ValueError(
            f"{file}: {name} has {rows} rows, an odd number cannot be halved; choose an unmodified model"
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
    """An autoencoder's weights under BFL's names; unknown names are kept."""
    levels = [int(match[1]) for name in tensors if (match := UP.match(name))]
    last = max(levels, default=0)
    result: dict[str, Weight] = {}
    for name, tensor in tensors.items():
        new = UP.sub(lambda match: f"decoder.up.{last - int(match[1])}.", name)
        for pattern, replacement in VAE_RENAMED:
            new = pattern.sub(replacement, new)
        is_attention = ".attn_1." in new and isinstance(tensor, Tensor) and tensor.ndim == 2
        result[new] = tensor[:, :, None, None] if is_attention and isinstance(tensor, Tensor) else tensor
    return result
