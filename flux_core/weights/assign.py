"""Assigns a file's tensors to a module on the meta device, without copying them wherever that is possible.

A linear layer whose weight is quantized becomes a `QuantizedLinear`. On a CPU so does one whose weight would
have to be copied to be used (converted to another dtype, or concatenated), if all such copies take much
memory. Every other tensor becomes a parameter in the dtype to compute in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..quant.formats import FP8, ConcatenatedWeight, DenseWeight, QuantizedWeight
from ..quant.linear import QuantizedLinear
from .finite import check_small_weights
from .header_limits import MAX_QUOTED
from .weight_file import Weight

log = logging.getLogger(__name__)

COMPUTABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_COPIED = 1 << 28
"""Bytes that a load on a CPU may copy to compute faster afterwards; above that, weights stay in the file."""

Module = TypeVar("Module", bound=nn.Module)


def assign_weights(
    model: Module,
    tensors: Mapping[str, Weight],
    file: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> Module:
    """The meta module with the file's weights, in eval mode, without gradients.

    `on_progress` is called with the bytes assigned so far and the total. Raises ValueError that names `file`
    unless names and shapes match exactly.
    """
    tensors = dict(tensors)
    _check_match(model, tensors, file)
    check_small_weights(tensors, file)
    dtype = choose_dtype(tensors, file, dtype)
    linear = {f"{name}.weight" for name, layer in model.named_modules() if type(layer) is nn.Linear}
    copied = sum(
        t.numel() * dtype.itemsize for n, t in tensors.items() if n in linear and _needs_copy(t, dtype)
    )
    keep_mapped = torch.device(device).type == "cpu" and copied > MAX_COPIED
    done, total = 0, sum(tensor.nbytes for tensor in tensors.values())
    dense: dict[str, Tensor] = {}
    quantized: dict[str, QuantizedWeight] = {}
    shared: dict[int, Tensor] = {}  # T5's embedding has two names
    for name, tensor in tensors.items():
        if name in linear and (_is_quantized(tensor) or (keep_mapped and _needs_copy(tensor, dtype))):
            quantized[name] = _moved(tensor, device)
        elif id(tensor) in shared:
            dense[name] = shared[id(tensor)]
        else:
            dense[name] = shared[id(tensor)] = _dense(tensor, dtype, device)
        done += tensor.nbytes
        if on_progress is not None:
            on_progress(done, total)
    model.load_state_dict(dense, strict=False, assign=True)  # only the quantized weights are missing
    for name, weight in quantized.items():
        _replace_linear(model, name.removesuffix(".weight"), weight, dtype)
    return model.to(device).requires_grad_(False).eval()  # .to moves buffers, which are not in files


def _replace_linear(model: nn.Module, name: str, weight: QuantizedWeight, dtype: torch.dtype) -> None:
    """Put a quantized layer in place of torch's, with its bias."""
    parent, _, child = name.rpartition(".")
    bias = getattr(model.get_submodule(name), "bias", None)
    setattr(model.get_submodule(parent), child, QuantizedLinear(weight, bias, dtype))


def _dense(tensor: Weight, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The values in `dtype` on the device."""
    values = tensor.dequantize(dtype) if isinstance(tensor, QuantizedWeight) else tensor
    if values.dtype in FP8:
        values = values.to(dtype)  # before the move, because not every device has fp8
    return values.to(device=device, dtype=dtype)


def _moved(tensor: Weight, device: torch.device | str) -> QuantizedWeight:
    return (DenseWeight(tensor) if isinstance(tensor, Tensor) else tensor).moved_to(torch.device(device))


def _computable(tensor: Weight) -> Tensor | None:
    """The tensor if torch computes in its dtype; None for packed, scaled, concatenated and 8-bit weights."""
    values = tensor.values if isinstance(tensor, DenseWeight) else tensor
    return values if isinstance(values, Tensor) and values.dtype in COMPUTABLE else None


def _is_quantized(tensor: Weight) -> bool:
    """Whether a weight is stored in fewer bits than torch computes with."""
    if isinstance(tensor, ConcatenatedWeight):
        return any(_is_quantized(part) for part in tensor.parts)
    return _computable(tensor) is None


def _needs_copy(tensor: Weight, dtype: torch.dtype) -> bool:
    """Whether a weight that is not quantized would have to be copied to compute in `dtype`."""
    values = _computable(tensor)
    return not _is_quantized(tensor) if values is None else values.dtype != dtype


def choose_dtype(tensors: Mapping[str, Weight], file: str, dtype: torch.dtype | None = None) -> torch.dtype:
    """The one dtype to compute in: `dtype` if given, else the file's.

    For a file of several dtypes it is the one that most parameters have, where quantized parameters, 8-bit
    floats among them, count as bfloat16. Raises ValueError for integers without scales.
    """
    counts: dict[torch.dtype, int] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and not tensor.is_floating_point():
            raise ValueError(
                f"{file} is quantized ({name} is {tensor.dtype}); choose a bf16, fp16 or fp32 file"
            )
        for part in tensor.parts if isinstance(tensor, ConcatenatedWeight) else (tensor,):
            values = _computable(part)
            kind = torch.bfloat16 if values is None else values.dtype
            counts[kind] = counts.get(kind, 0) + part.numel()
    if dtype is not None:
        return dtype
    chosen = max(counts, key=lambda candidate: counts[candidate])
    if len(counts) > 1:
        log.info("%s holds %s; computing in %s", file, ", ".join(map(str, counts)), chosen)
    return chosen


def _check_match(model: nn.Module, tensors: Mapping[str, Weight], file: str) -> None:
    """Raise ValueError with the first few names unless names and shapes are exactly the module's."""
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise ValueError(f"{file} lacks {_listed(missing)} of this model; choose a file of the whole model")
    unknown = [name for name in tensors if name not in wanted]
    if unknown:
        raise ValueError(
            f"{file} has {_listed(unknown)} that this model does not have; choose an unmodified model"
        )
    for name, tensor in wanted.items():
        if tensor.shape != tensors[name].shape:
            got, want = list(tensors[name].shape), list(tensor.shape)
            raise ValueError(
                f"{file}: {name} has shape {got}, but its other tensors need {want}; "
                "choose an unmodified model"
            )


def _listed(names: list[str]) -> str:
    """The number of names and the first three."""
    more = ", ..." if len(names) > 3 else ""
    shown = ", ".join(name[:MAX_QUOTED] for name in names[:3])
    return f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} ({shown}{more})"
