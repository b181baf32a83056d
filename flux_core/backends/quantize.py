"""Quantize the layers of a loaded model: to int8 for CPUs, to fp8 for CUDA cards (see fp8.py)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ..memory import GIB
from ..model.transformer import FluxTransformer
from ..quant.formats import ConcatenatedWeight, DenseWeight, ScaledWeight, has_fp8
from ..quant.linear import QuantizedLinear, compute_dtype, device_of
from .cpu_int8 import Int8Linear
from .cpu_pack import COMPUTABLE, Place, Progress, inside, layers_of, replace_layers
from .fp8 import FP8, STEP, Fp8Linear, can_multiply, to_fp8


def quantize_to_int8(
    model: FluxTransformer, limit: int | None = None, on_progress: Progress | None = None
) -> int:
    """Multiply in int8 in the layers of every block (`Int8Linear`); returns how many.

    The first and the last layer, and those that keep quantised weights, stay as they are. Raises ValueError
    for a model that is streamed, and for one that would take more than `limit` bytes. `on_progress` as in
    `pack_weights`.
    """
    _check(model, "int8", int8_bytes(model), limit)

    def quantised(layer: nn.Linear | QuantizedLinear, qkv_dim: int | None) -> nn.Module | None:
        if not _can_quantise(layer):
            return None
        numbers = layer.weight if isinstance(layer, nn.Linear) else layer.dense_weight(layer.dtype)
        return Int8Linear(numbers, layer.bias, qkv_dim)

    return replace_layers(model, quantised, layers_of(model, ends=False), on_progress)


def quantize_to_fp8(
    model: FluxTransformer,
    device: torch.device | None = None,
    limit: int | None = None,
    on_progress: Progress | None = None,
    then: torch.device | None = None,
) -> int:
    """Multiply in fp8 in the blocks but the last (`Fp8Linear`), modulations too; returns in how many layers.

    With a device each weight is brought there to be quantised, and stays, or goes on to `then`. Files in
    float8_e4m3fn hand their codes over; layers that keep weights quantised in other ways stay as they are.
    Raises ValueError as `quantize_to_int8`.
    """
    _check(model, "fp8", fp8_bytes(model), limit)

    def quantised(layer: nn.Linear | QuantizedLinear, qkv_dim: int | None) -> nn.Module | None:
        if not _can_be_fp8(layer):
            return None
        where = device or device_of(layer)
        weight = layer.weight.detach() if isinstance(layer, nn.Linear) else layer.stored
        return Fp8Linear(to_fp8(weight.to(where)), layer.bias, compute_dtype(layer)).to(then or where)

    can_multiply(device or model.device)  # a card is tried now, not when something compiles
    return replace_layers(model, quantised, _fp8_layers(model), on_progress)


def check_int8(device: torch.device) -> None:
    """Raise ValueError unless int8 is of use on the device that is to compute."""
    if device.type != "cpu":
        raise ValueError(
            f"weight_dtype int8 is for models that compute on a CPU, this one would on {device.type}; "
            "choose fp8, or auto"
        )


def check_fp8(device: torch.device) -> None:
    """Raise ValueError where the device that is to compute cannot hold fp8."""
    if not has_fp8(device):
        raise ValueError(
            f"weight_dtype fp8 is for devices that have 8-bit floats, and {device.type} has none; choose auto"
        )


def int8_bytes(model: FluxTransformer) -> int:
    """Bytes of weights that `quantize_to_int8` would leave: a code for each number of what it quantises."""
    layers = (layer for _, _, layer in layers_of(model, ends=False) if _can_quantise(layer))
    return _bytes_with_codes(model, layers)


def fp8_bytes(model: FluxTransformer) -> int:
    """Bytes of weights that `quantize_to_fp8` would leave."""
    return _bytes_with_codes(model, (layer for _, _, layer in _fp8_layers(model) if _can_be_fp8(layer)))


def _bytes_with_codes(model: FluxTransformer, layers: Iterable[nn.Linear | QuantizedLinear]) -> int:
    """A model's bytes once these layers keep a byte for each number."""
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    for layer in layers:
        kept = layer.stored.nbytes if isinstance(layer, QuantizedLinear) else layer.weight.nbytes
        held += layer.in_features * layer.out_features - kept
    return held


def _check(model: FluxTransformer, form: str, needed: int, limit: int | None) -> None:
    """Raise ValueError unless a model that takes `needed` bytes in a form can be brought into it."""
    if model.streaming is not None:
        raise ValueError(
            f"{form} needs a model that is not streamed, got one that is larger than its memory limit; "
            "raise memory_limit, or choose another weight_dtype"
        )
    if limit is not None and needed > limit:
        raise ValueError(
            f"in {form} the model takes {needed / GIB:.1f} GB, the memory limit is {limit / GIB:.1f} GB; "
            "raise memory_limit, or choose auto as weight_dtype, which streams the model"
        )


def _fp8_layers(model: FluxTransformer) -> Iterator[Place]:
    """The linear layers that bear fp8: see fp8.py for the others."""
    for block in [*model.double_blocks, *list(model.single_blocks)[:-1]]:
        yield from inside(block, modulations=True)


def _can_quantise(layer: nn.Linear | QuantizedLinear, own: torch.dtype | None = None) -> bool:
    """Whether a layer has numbers to quantise, or codes in `own` to hand over, and has them in memory."""
    if isinstance(layer, nn.Linear):
        return not layer.weight.is_meta
    stored = layer.stored
    return all(
        (isinstance(part, DenseWeight) and part.values.dtype in (*COMPUTABLE, own))
        or (isinstance(part, ScaledWeight) and part.codes.dtype == own)
        for part in (stored.parts if isinstance(stored, ConcatenatedWeight) else (stored,))
    )


def _can_be_fp8(layer: nn.Linear | QuantizedLinear) -> bool:
    """Whether a layer can become an `Fp8Linear`: by its sides, and as `_can_quantise`."""
    sides = layer.in_features % STEP == 0 and layer.out_features % STEP == 0
    return sides and not isinstance(layer, Fp8Linear) and _can_quantise(layer, FP8)
