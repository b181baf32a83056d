"""Dequantization as one operator, for torch.compile.

A compiler would unroll the loop over slices and cannot read fp8 on every GPU. The weight's tensors are inputs
of the operator, so that compiled code is shared by all weights of one format and size, and its format is a
string.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .formats import ConcatenatedWeight, DenseWeight, GGUFWeight, LookupWeight, QuantizedWeight, ScaledWeight
from .four_bit import FourBitWeight, NestedScales

CLASSES: dict[str, type[QuantizedWeight]] = {
    cls.__name__: cls
    for cls in (
        DenseWeight,
        ScaledWeight,
        LookupWeight,
        GGUFWeight,
        FourBitWeight,
        NestedScales,
        ConcatenatedWeight,
    )
}


def rebuild(description: str, tensors: Sequence[Tensor]) -> QuantizedWeight:
    """The weight with a `description` and these `tensors()`."""
    return _rebuilt(json.loads(description), iter(tensors))


def _rebuilt(described: list[Any], tensors: Iterator[Tensor]) -> Any:
    match described:
        case ["tensor"]:
            return next(tensors)
        case ["weight", name, arguments]:
            return CLASSES[name](**{key: _rebuilt(value, tensors) for key, value in arguments.items()})
        case ["parts", parts]:
            return [_rebuilt(part, tensors) for part in parts]
        case ["value", value]:
            return value
    raise ValueError(f"a weight's description cannot contain {described!r}")


@torch.library.custom_op("rectiflux::dequantize", mutates_args=())
def dequantized(
    tensors: Sequence[Tensor],
    description: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The weight's values on a device, in memory of their own."""
    values = rebuild(description, tensors).moved_to(device).dequantize(dtype)
    return values.clone() if any(values is tensor for tensor in tensors) else values


@dequantized.register_fake
def _(
    tensors: Sequence[Tensor],
    description: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)
