"""Builds quantized weights from the tensors that a file stores them in: values, scales and descriptions.

Supported are, by the names beside NAME.weight:

  scaled fp8      NAME.scale_weight, and `scaled_fp8` once per file; or NAME.weight_scale, with
                  `_quantization_metadata` in the metadata or NAME.comfy_quant (ComfyUI, QUANTIZATION.md)
  scaled int8     the same, format int8_tensorwise
  NF4, FP4        NAME.weight.absmax, .quant_map, .quant_state.bitsandbytes__nf4, nested or not
  LLM.int8        NAME.SCB, a scale for each row (bitsandbytes)

The scales of activations (`scale_input`, `input_scale`) serve fp8 matmuls with static scales and are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..quant.formats import ScaledWeight
from ..quant.four_bit import FourBitWeight, NestedScales
from .messages import quoted
from .weight_file import Weight, WeightFile

FLOAT8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
INT8 = "int8_tensorwise"
QUANT_STATE = ".quant_state."
"""Separates a 4-bit weight's name from the kind in the name of its description."""

SCALES = ("scale_weight", "weight_scale")
UNUSED = ("scaled_fp8", "scale_input", "input_scale", "weight_format", "comfy_quant")
"""Last parts of the names of tensors that are not needed once the weights are assembled."""

ADVICE = "choose a bf16, fp8 or GGUF file"


def assemble(file: WeightFile) -> dict[str, Weight]:
    """The file's weights by name, quantized ones as one `QuantizedWeight` each; other tensors are kept.

    Raises ValueError for unsupported formats, by name, and for scales and descriptions that do not match.
    """
    formats = _formats(file)
    tensors = dict(file.tensors)
    states = {n.split(QUANT_STATE, 1)[0]: n for n in tensors if QUANT_STATE in n}
    for name in [name for name in tensors if name.endswith(".weight")]:
        layer, weight = name.removesuffix(".weight"), tensors[name]
        if not isinstance(weight, Tensor):
            continue
        if name in states:
            tensors[name] = _four_bit(tensors, name, weight, states[name], file.name)
        else:
            tensors[name] = _scaled(tensors, layer, weight, formats.get(layer), file.name)
    if any(isinstance(tensor, (ScaledWeight, FourBitWeight)) for tensor in tensors.values()) or formats:
        tensors = {n: t for n, t in tensors.items() if n.rsplit(".", 1)[-1] not in UNUSED}
    return tensors


def _scaled(tensors: dict[str, Weight], layer: str, weight: Tensor, format: str | None, file: str) -> Weight:
    """A layer's weight with its scale, which is removed from `tensors`; without one, the weight itself."""
    if f"{layer}.SCB" in tensors and weight.dtype == torch.int8:
        scale = _float32(tensors.pop(f"{layer}.SCB"), layer, file) / 127
        return ScaledWeight(weight, _checked_scale(scale, weight, layer, file))
    if format in FLOAT8:
        weight = weight.view(FLOAT8[format]) if weight.dtype == torch.uint8 else weight
    elif format == INT8:
        if weight.dtype != torch.int8:
            raise ValueError(
                f"{file} describes int8 weights, but {layer} is {weight.dtype}, not int8; {ADVICE}"
            )
    elif format is not None:
        name = quoted(format, 100)
        raise ValueError(f"{file} is quantized as {name} ({layer}), which is not supported; {ADVICE}")
    name = next((f"{layer}.{scale}" for scale in SCALES if f"{layer}.{scale}" in tensors), None)
    if name is None or weight.dtype not in (*FLOAT8.values(), torch.int8):
        return weight
    return ScaledWeight(weight, _checked_scale(_float32(tensors.pop(name), layer, file), weight, layer, file))


def _float32(scale: Weight, layer: str, file: str) -> Tensor:
    if not isinstance(scale, Tensor) or not scale.is_floating_point():
        raise ValueError(
            f"{file}: the quantization scale of {layer} is not a floating-point tensor; {ADVICE}"
        )
    return scale.float()


def _checked_scale(scale: Tensor, weight: Tensor, layer: str, file: str) -> Tensor:
    """One scale for the whole weight [] or one for each row [out, 1]."""
    if scale.numel() == 1:
        return scale.reshape(())
    if weight.ndim != 2 or scale.numel() != weight.shape[0]:
        raise ValueError(
            f"{file}: {layer} has {scale.numel():,} scales for a weight of shape {[*weight.shape]}, "
            f"one or one for each row is supported; {ADVICE}"
        )
    return scale.reshape(-1, 1)


def _formats(file: WeightFile) -> dict[str, str]:
    """The format of each layer that ComfyUI's metadata or its tensors `comfy_quant` describe."""
    described: dict[str, Any] = {}
    if "_quantization_metadata" in file.metadata:
        layers = _json(file.metadata["_quantization_metadata"], "_quantization_metadata", file.name).get(
            "layers"
        )
        if not isinstance(layers, dict):
            raise ValueError(f"the _quantization_metadata of {file.name} has no layers; {ADVICE}")
        described = {name.removeprefix(file.prefix): layer for name, layer in layers.items()}
    for name, tensor in file.tensors.items():
        if name.endswith(".comfy_quant") and isinstance(tensor, Tensor):
            described[name.removesuffix(".comfy_quant")] = _json(_text(tensor), name, file.name)
    formats: dict[str, str] = {}
    for layer, about in described.items():
        if f"{layer}.weight" not in file.tensors:
            continue
        if not isinstance(about, Mapping) or not isinstance(about.get("format"), str):
            raise ValueError(
                f"{file.name} does not state the format of {layer}, which it describes; {ADVICE}"
            )
        params = about.get("params")
        rotated = about.get("convrot") or (isinstance(params, Mapping) and params.get("convrot"))
        formats[layer] = f"{about['format']} (rotated)" if rotated else about["format"]
    return formats


def _text(tensor: Tensor) -> str:
    return bytes(tensor.to(torch.uint8).flatten().tolist()).decode("utf-8", "replace")


def _json(text: str, what: str, file: str) -> dict[str, Any]:
    """A JSON object, or a ValueError that names the file."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"the {what} of {file} is not a JSON object; {ADVICE}")
    return value


def _four_bit(tensors: dict[str, Weight], name: str, packed: Tensor, state: str, file: str) -> FourBitWeight:
    """A 4-bit weight of bitsandbytes (bitsandbytes/functional.py, QuantState.from_dict)."""
    kind = state.rsplit("__", 1)[-1]
    description = tensors.pop(state)
    about = _json(_text(description) if isinstance(description, Tensor) else "", state, file)
    parts = {
        key: tensors.pop(f"{name}.{key}", None)
        for key in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    }
    absmax, code, nested_absmax, nested_code = parts.values()
    try:
        if not isinstance(absmax, Tensor) or not isinstance(code, Tensor):
            raise ValueError
        nested = isinstance(nested_absmax, Tensor) and isinstance(nested_code, Tensor)
        if (absmax.dtype == torch.uint8) != nested:
            raise ValueError
        scales: Tensor | NestedScales = absmax.float().reshape(-1)
        if isinstance(nested_absmax, Tensor) and isinstance(nested_code, Tensor):
            offset = torch.tensor(float(about["nested_offset"])) if "nested_offset" in about else None
            group = int(about.get("nested_blocksize", 256))
            scales = NestedScales(
                absmax.reshape(-1), nested_code.float(), nested_absmax.float(), group, offset
            )
        weight = FourBitWeight(
            packed.view(torch.uint8).reshape(-1),
            scales,
            code.float(),
            [int(side) for side in about["shape"]],
            int(about["blocksize"]),
            kind,
        )
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{file}: the {kind} description of {name} does not match it; {ADVICE}") from error
    return weight
