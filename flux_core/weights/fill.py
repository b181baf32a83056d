"""Tensors into a module on the meta device: assigned as they lie in the file wherever that is possible.

A linear layer whose weight is quantised becomes a `QuantizedLinear`, and so does, on a CPU, one whose numbers
would have to be copied to be used (into another dtype, or to stand below each other), where that is much. All
else becomes a parameter in the dtype to compute in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..quant.formats import FP8, ConcatenatedWeight, DenseWeight, QuantizedWeight
from ..quant.linear import QuantizedLinear
from .checkpoint import Weight

log = logging.getLogger(__name__)

COMPUTABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COPIED = 1 << 28
"""Bytes that a load on a CPU may copy to compute faster afterwards; beyond, weights stay in the file."""

Module = TypeVar("Module", bound=nn.Module)


def fill(
    model: Module,
    tensors: Mapping[str, Weight],
    file: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> Module:
    """The meta module with the file's weights, in eval mode, without gradients.

    `on_progress` hears the bytes that have been placed and those in all. Raises ValueError that names `file`
    unless names and shapes fit exactly.
    """
    tensors = dict(tensors)
    _check_fit(model, tensors, file)
    dtype = choose_dtype(tensors, file, dtype)
    linear = {f"{name}.weight" for name, layer in model.named_modules() if type(layer) is nn.Linear}
    copied = sum(
        t.numel() * dtype.itemsize for n, t in tensors.items() if n in linear and _needs_copy(t, dtype)
    )
    lazily = torch.device(device).type == "cpu" and copied > COPIED
    done, total = 0, sum(tensor.nbytes for tensor in tensors.values())
    dense: dict[str, Tensor] = {}
    stored: dict[str, QuantizedWeight] = {}
    twins: dict[int, Tensor] = {}  # T5 has one embedding under two names
    for name, tensor in tensors.items():
        if name in linear and (_quantised(tensor) or (lazily and _needs_copy(tensor, dtype))):
            stored[name] = _moved(tensor, device)
        elif id(tensor) in twins:
            dense[name] = twins[id(tensor)]
        else:
            numbers = tensor.dequantize(dtype) if isinstance(tensor, QuantizedWeight) else tensor
            if numbers.dtype in FP8:
                numbers = numbers.to(dtype)  # here, because not every device has fp8
            dense[name] = twins[id(tensor)] = numbers.to(device=device, dtype=dtype)
        done += tensor.nbytes
        if on_progress is not None:
            on_progress(done, total)
    model.load_state_dict(dense, strict=False, assign=True)  # what is missing are the stored weights
    for name, weight in stored.items():
        _put(model, name.removesuffix(".weight"), weight, dtype)
    return model.to(device).requires_grad_(False).eval()  # .to moves buffers, which no file holds


def _put(model: nn.Module, name: str, weight: QuantizedWeight, dtype: torch.dtype) -> None:
    """A stored layer in the place of torch's, with its bias."""
    parent, _, child = name.rpartition(".")
    bias = getattr(model.get_submodule(name), "bias", None)
    setattr(model.get_submodule(parent), child, QuantizedLinear(weight, bias, dtype))


def _moved(tensor: Weight, device: torch.device | str) -> QuantizedWeight:
    return (DenseWeight(tensor) if isinstance(tensor, Tensor) else tensor).to(torch.device(device))


def _numbers(tensor: Weight) -> Tensor | None:
    """The tensor of numbers that torch computes with, or None for packed, scaled, joined and 8-bit ones."""
    values = tensor.values if isinstance(tensor, DenseWeight) else tensor
    return values if isinstance(values, Tensor) and values.dtype in COMPUTABLE else None


def _quantised(tensor: Weight) -> bool:
    """Whether a weight is kept in fewer bits than torch computes with."""
    if isinstance(tensor, ConcatenatedWeight):
        return any(_quantised(part) for part in tensor.parts)
    return _numbers(tensor) is None


def _needs_copy(tensor: Weight, dtype: torch.dtype) -> bool:
    """Whether a weight that is not quantised would have to be copied to compute in `dtype`."""
    numbers = _numbers(tensor)
    return not _quantised(tensor) if numbers is None else numbers.dtype != dtype


def choose_dtype(tensors: Mapping[str, Weight], file: str, dtype: torch.dtype | None = None) -> torch.dtype:
    """The one dtype to compute in: the asked one, else the file's.

    A file that mixes dtypes gets the one most of its numbers have. Quantised numbers, 8-bit floats among
    them, are computed in bfloat16. Raises ValueError for integers without scales.
    """
    counts: dict[torch.dtype, int] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and not tensor.is_floating_point():
            raise ValueError(
                f"{file} is quantised ({name} is {tensor.dtype}); choose a bf16, fp16 or fp32 file"
            )
        for part in tensor.parts if isinstance(tensor, ConcatenatedWeight) else (tensor,):
            numbers = _numbers(part)
            kind = torch.bfloat16 if numbers is None else numbers.dtype
            counts[kind] = counts.get(kind, 0) + part.numel()
    if dtype is not None:
        return dtype
    chosen = max(counts, key=lambda candidate: counts[candidate])
    if len(counts) > 1:
        log.info("%s holds %s; computing in %s", file, ", ".join(map(str, counts)), chosen)
    return chosen


def _check_fit(model: nn.Module, tensors: Mapping[str, Weight], file: str) -> None:
    """Raise ValueError with the first few names unless the tensors are exactly the module's."""
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise ValueError(f"{file} lacks {_some(missing)}; it is incomplete, download it again")
    unknown = [name for name in tensors if name not in wanted]
    if unknown:
        raise ValueError(
            f"{file} has {_some(unknown)} that this model does not know; choose an unmodified model"
        )
    for name, tensor in wanted.items():
        if tensor.shape != tensors[name].shape:
            got, want = list(tensors[name].shape), list(tensor.shape)
            raise ValueError(
                f"{file}: {name} must be {want} by its other tensors, got {got}; download it again"
            )


def _some(names: list[str]) -> str:
    """The count of names and the first three."""
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} ({', '.join(names[:3])}{more})"
