"""Quantizes the layers of a loaded model: to int8 on CPUs (cpu_int8.py), to fp8 on CUDA devices (fp8.py)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ..memory import GIB
from ..model.transformer import FluxTransformer
from ..quant.formats import ConcatenatedWeight, DenseWeight, ScaledWeight, has_fp8
from ..quant.linear import QuantizedLinear, compute_dtype, device_of
from .cpu_int8 import Int8Linear, quantize_int8
from .cpu_pack import Place, Progress, layers_inside, layers_of, replace_layers
from .fp8 import FP8, MULTIPLE, Fp8Linear, can_multiply, to_fp8

Linear = nn.Linear | QuantizedLinear
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def quantize_to_int8(
    model: FluxTransformer, limit: int | None = None, on_progress: Progress | None = None
) -> int:
    """Replace the layers of every block by `Int8Linear`; returns how many.

    The first and the last layer and quantized layers stay as they are. Raises ValueError for a streamed model
    and for one that would take more than `limit` bytes.
    """
    _check(model, "int8", int8_bytes(model), limit)

    def quantized(layer: Linear, qkv_dim: int | None) -> nn.Module | None:
        if not _can_quantize(layer):
            return None
        dtype = compute_dtype(layer)
        weight = layer.weight if isinstance(layer, nn.Linear) else layer.dense_weight(dtype)
        return Int8Linear(quantize_int8(weight), layer.bias, dtype, qkv_dim)

    return replace_layers(model, quantized, layers_of(model, ends=False), on_progress)


def quantize_to_fp8(
    model: FluxTransformer,
    device: torch.device | None = None,
    limit: int | None = None,
    on_progress: Progress | None = None,
    then: torch.device | None = None,
) -> int:
    """Replace the layers of all blocks but the last, modulations included, by `Fp8Linear`; returns how many.

    With a `device`, each weight is quantized there and stays, or moves on to `then`. The codes of
    float8_e4m3fn files are used as they are; layers quantized in other formats stay as they are. Raises
    ValueError for a streamed model and for one that would take more than `limit` bytes.
    """
    _check(model, "fp8", fp8_bytes(model), limit)

    def quantized(layer: Linear, qkv_dim: int | None) -> nn.Module | None:
        if not _can_be_fp8(layer):
            return None
        where = device or device_of(layer)
        if isinstance(layer, nn.Linear):
            weight = to_fp8(layer.weight.detach().to(where))
        else:
            weight = to_fp8(layer.quantized.moved_to(where))
        return Fp8Linear(weight, layer.bias, compute_dtype(layer)).to(then or where)

    can_multiply(device or model.device)  # the GPU is tried now, not while something is compiled
    return replace_layers(model, quantized, _fp8_layers(model), on_progress)


def check_int8(device: torch.device) -> None:
    """Raise ValueError unless the device that will compute is a CPU."""
    if device.type != "cpu":
        raise ValueError(
            f"weight_dtype int8 is for models that compute on a CPU, this one would on {device.type}; "
            "choose fp8, or auto"
        )


def check_fp8(device: torch.device) -> None:
    """Raise ValueError unless the device that will compute supports fp8 tensors."""
    if not has_fp8(device):
        raise ValueError(
            f"weight_dtype fp8 is for devices that support 8-bit floats, {device.type} does not; choose auto"
        )


def int8_bytes(model: FluxTransformer) -> int:
    """Bytes of the model's weights after `quantize_to_int8`, without scales."""
    return _bytes_after(model, (layer for *_, layer in layers_of(model, ends=False) if _can_quantize(layer)))


def fp8_bytes(model: FluxTransformer) -> int:
    """Bytes of the model's weights after `quantize_to_fp8`, without scales."""
    return _bytes_after(model, (layer for *_, layer in _fp8_layers(model) if _can_be_fp8(layer)))


def _bytes_after(model: FluxTransformer, layers: Iterable[Linear]) -> int:
    """A model's bytes once the weights of these layers take one byte per element."""
    total = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    for layer in layers:
        before = layer.quantized.nbytes if isinstance(layer, QuantizedLinear) else layer.weight.nbytes
        total += layer.in_features * layer.out_features - before
    return total


def _check(model: FluxTransformer, dtype: str, needed: int, limit: int | None) -> None:
    """Raise ValueError for a streamed model and for one that needs more than `limit` bytes in a dtype."""
    if model.streaming is not None:
        raise ValueError(
            f"{dtype} needs a model that is not streamed, got one that is larger than its memory limit; "
            "raise memory_limit, or choose another weight_dtype"
        )
    if limit is not None and needed > limit:
        raise ValueError(
            f"in {dtype} the model takes {needed / GIB:.1f} GB, the memory limit is {limit / GIB:.1f} GB; "
            "raise memory_limit, or choose auto as weight_dtype, which streams the model"
        )


def _fp8_layers(model: FluxTransformer) -> Iterator[Place]:
    """The layers that tolerate fp8; fp8.py lists the errors of the others."""
    for block in [*model.double_blocks, *list(model.single_blocks)[:-1]]:
        yield from layers_inside(block, modulations=True)


def _can_quantize(layer: Linear, own: torch.dtype | None = None) -> bool:
    """Whether a layer's weight is in memory and floating-point, or already has codes in the dtype `own`."""
    if isinstance(layer, nn.Linear):
        return not layer.weight.is_meta
    weight = layer.quantized
    return all(
        (isinstance(part, DenseWeight) and part.values.dtype in (*FLOATS, own))
        or (isinstance(part, ScaledWeight) and part.codes.dtype == own)
        for part in (weight.parts if isinstance(weight, ConcatenatedWeight) else (weight,))
    )


def _can_be_fp8(layer: Linear) -> bool:
    """Whether a layer can become an `Fp8Linear`."""
    sides = layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0
    return sides and not isinstance(layer, Fp8Linear) and _can_quantize(layer, FP8)
