"""Finds weights that hold NaN or inf: at once where a look is cheap, and in a whole model when it failed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..quant.formats import QuantizedWeight
from ..quant.linear import OpaqueWeightLinear
from .source_files import files_of
from .weight_file import Weight

MAX_ELEMENTS = 1 << 16
"""Elements of the largest tensor that is read when a file is loaded."""


def check_small_weights(tensors: Mapping[str, Weight], file: str) -> None:
    """Raise ValueError that names the first norm, bias or quantization scale with NaN or inf."""
    for name, weight in tensors.items():
        if any(not _is_finite(part) for part in _cheap(weight)):
            raise ValueError(f"{file} holds NaN or inf in {name}; choose another file")


def _cheap(weight: Weight) -> list[Tensor]:
    """A vector itself, the scales of a quantized weight."""
    parts = [weight] if isinstance(weight, Tensor) else weight.tensors()
    limit = 2 if isinstance(weight, Tensor) else 3
    return [part for part in parts if part.ndim < limit and part.numel() <= MAX_ELEMENTS]


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.is_meta:
        return True
    return bool(torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all())


def not_finite_weight(*modules: nn.Module) -> str | None:
    """The first weight with NaN or inf, with its file where that is known; None if all are finite.

    Every weight is read, dequantized one at a time: for a run that has failed.
    """
    for module in modules:
        for name, tensor in _dense_weights(module):
            if not _is_finite(tensor):
                files = ", ".join(file.path.name for file in files_of(module)[:3])
                return f"{name} of {files}" if files else name
    return None


def _dense_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight and bias by name, one at a time."""
    for prefix, part in module.named_modules():
        if isinstance(part, OpaqueWeightLinear):
            yield f"{prefix}.weight", part.dense_weight(torch.float32)
        if not isinstance(part, QuantizedWeight):
            for name, parameter in part.named_parameters(recurse=False):
                yield f"{prefix}.{name}", parameter
