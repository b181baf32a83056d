"""A model written in every quantized file format, with the dequantized weights of each file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.torch import save_file
from torch import Tensor

from ...flux_core.model.transformer import FluxTransformer
from ...flux_core.quant.four_bit import NestedScales
from ...flux_core.quant.gguf import BLOCK_TYPES
from .models import flux_transformer
from .quantized import QUANTIZABLE, fp8, int8, nested_nf4, nf4, random_blocks

State = dict[str, Tensor]
Quantize = Callable[[Tensor], tuple[State, Tensor]]
"""A weight -> (tensors of the file by the end of their name, the dequantized weight)."""
WIDE = {"hidden_size": 256, "depth": 1, "depth_single": 1, "context_in": 256, "vec_in": 256}
"""Sizes at which every large weight has rows that are multiples of 256, as the K types need."""


def wide_transformer() -> FluxTransformer:
    return flux_transformer(**WIDE)


def large(name: str, tensor: Tensor) -> bool:
    """Whether published files quantize this tensor: matrices, except the first layer."""
    return tensor.ndim == 2 and not name.startswith("img_in.")


def quantize_state(state: State, quantize: Quantize) -> tuple[State, State]:
    """(tensors of a file, dequantized state)."""
    tensors, dequantized = {}, {}
    for name, tensor in state.items():
        if large(name, tensor):
            parts, dequantized[name] = quantize(tensor)
            stem = name.removesuffix("weight")
            tensors.update({stem + ending: part.contiguous() for ending, part in parts.items()})
        else:
            tensors[name] = dequantized[name] = tensor
    return tensors, dequantized


def plain_fp8(dtype: torch.dtype) -> Quantize:
    return lambda weight: ({"weight": weight.to(dtype)}, weight.to(dtype).float())


def scaled_fp8(scale_name: str) -> Quantize:
    def quantize(weight: Tensor) -> tuple[State, Tensor]:
        stored, values = fp8(weight)
        return {"weight": stored.codes, scale_name: stored.scale, "scale_input": torch.tensor(1.0)}, values

    return quantize


def comfy_layer(weight: Tensor) -> tuple[State, Tensor]:
    """A layer described by a tensor of its own, codes as bytes, and an activation scale that is not used."""
    stored, values = fp8(weight)
    about = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    codes = stored.codes.view(torch.uint8)
    parts = {"weight": codes, "weight_scale": stored.scale.reshape(1), "comfy_quant": about}
    return {**parts, "input_scale": torch.tensor(2.0)}, values


def scb(weight: Tensor) -> tuple[State, Tensor]:
    """bitsandbytes' int8: each row's absmax, a code is 1/127 of it."""
    absmax = weight.abs().amax(dim=1)
    codes = (weight * (127 / absmax)[:, None]).round().to(torch.int8)
    parts = {"weight": codes, "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, codes.float() * (absmax / 127)[:, None]


def four_bit(nested: bool) -> Quantize:
    def quantize(weight: Tensor) -> tuple[State, Tensor]:
        stored, values = (nested_nf4 if nested else nf4)(weight)
        about = {
            "quant_type": "nf4",
            "blocksize": stored.block,
            "shape": list(weight.shape),
            "dtype": "bfloat16",
        }
        scales = stored.absmax
        parts = {"weight": stored.packed, "weight.quant_map": stored.levels}
        if isinstance(scales, NestedScales):
            parts |= {"weight.absmax": scales.codes, "weight.nested_absmax": scales.absmax}
            parts["weight.nested_quant_map"] = scales.levels
            about |= {"nested_blocksize": scales.group, "nested_offset": float(scales.offset)}
        else:
            parts["weight.absmax"] = scales
        state = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
        return {**parts, "weight.quant_state.bitsandbytes__nf4": state}, values

    return quantize


def int8_rows(weight: Tensor) -> tuple[State, Tensor]:
    stored, values = int8(weight)
    return {"weight": stored.codes, "weight_scale": stored.scale}, values


def _layers(state: State, form: str) -> dict[str, str]:
    layers = {n.removesuffix(".weight"): {"format": form} for n, t in state.items() if large(n, t)}
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def write_quantized_safetensors(state: State, path: Path, form: str) -> State:
    """Write the state dict in a format of FORMS; return the dequantized weights."""
    quantize, marker, metadata = FORMS[form]
    tensors, dequantized = quantize_state(state, quantize)
    save_file({**tensors, **marker}, path, _layers(state, metadata) if metadata else None)
    return dequantized


FORMS: dict[str, tuple[Quantize, State, str]] = {
    "fp8 e4m3fn": (plain_fp8(torch.float8_e4m3fn), {}, ""),
    "fp8 e5m2": (plain_fp8(torch.float8_e5m2), {}, ""),
    "scale_weight": (scaled_fp8("scale_weight"), {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, ""),
    "metadata": (scaled_fp8("weight_scale"), {}, "float8_e4m3fn"),
    "comfy_quant": (comfy_layer, {}, ""),
    "int8 by rows": (int8_rows, {}, "int8_tensorwise"),
    "SCB": (scb, {}, ""),
    "NF4": (four_bit(False), {}, ""),
    "nested NF4": (four_bit(True), {}, ""),
}
"""Name -> (how a large weight is quantized, additional tensors, the format named in the metadata)."""


def blocks_like(weight: Tensor, kind: str, seed: int) -> np.ndarray:
    """Random blocks whose dequantized values have the weight's standard deviation."""
    rows, blocks, largest = weight.shape[0], weight.shape[1] // BLOCK_TYPES[kind].size, 1e-4
    values = quants.dequantize(random_blocks(kind, rows, blocks, seed, largest), GGMLQuantizationType[kind])
    return random_blocks(kind, rows, blocks, seed, largest * float(weight.std()) / float(values.std()))


def write_gguf(state: State, path: Path, kind: str, architecture: str = "flux", **metadata: object) -> State:
    """Write a GGUF file whose large weights are of type `kind`; return the dequantized weights.

    Types that the gguf package cannot quantize to get random blocks.
    """
    writer, dequantized = GGUFWriter(path, architecture), dict(state)
    for i, (name, tensor) in enumerate(state.items()):
        data, data_type = tensor.float().numpy(), GGMLQuantizationType.F32
        if large(name, tensor) and tensor.shape[1] % BLOCK_TYPES[kind].size == 0:
            data_type = GGMLQuantizationType[kind]
            data = quants.quantize(data, data_type) if kind in QUANTIZABLE else blocks_like(tensor, kind, i)
            values = quants.dequantize(data.view(np.uint8), data_type)
            dequantized[name] = torch.from_numpy(np.array(values))
        writer.add_tensor(name, data, raw_dtype=data_type)
    for key, value in metadata.items():
        writer.add_string(f"general.{key}", str(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dequantized
