"""Weights in oneDNN's blocked memory layout, the one that the CPU's matmul kernels read.

torch's own layers pass weights in rows, and oneDNN reorders them at every call.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    from torch._library.opaque_object import register_opaque_type
    from torch._opaque_base import OpaqueBase
except ImportError:  # older torch: compiled code is interrupted by every packed layer
    register_opaque_type, OpaqueBase = None, object


class PackedWeight(OpaqueBase):  # type: ignore[misc, valid-type]  # object in older torch
    """A weight in oneDNN's layout, an opaque tensor. It is never written to, so copies of a layer share it.

    torch.compile cannot trace opaque tensors; an object of a registered opaque type is an input of compiled
    code like any tensor, so that all layers of one size share it.
    """

    __module__ = re.sub(r"\W", "_", __name__)
    """The prefix of the type's name for torch, an identifier: ComfyUI names its modules by their paths."""

    def __init__(self, opaque: Tensor) -> None:
        self.opaque = opaque

    @property
    def nbytes(self) -> int:
        """Bytes of the weight, without the layout's padding."""
        return self.opaque.numel() * self.opaque.element_size()

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        return self


if register_opaque_type is not None:
    register_opaque_type(PackedWeight, typ="reference")


def packed_operator(name: str, fake: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], Any]:
    """Decorator: a function of a `PackedWeight` as one operator `name` for torch.compile.

    `fake` returns an empty tensor like the function's result.
    """

    def operator(function: Callable[..., Tensor]) -> Any:
        if register_opaque_type is None:
            return torch.compiler.disable(function)
        wrapped = torch.library.custom_op(name, function, mutates_args=())
        wrapped.register_fake(fake)
        return wrapped

    return operator


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch packs weights of a dtype (float32, bfloat16, int8) on this CPU."""
    ops = torch.ops
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.int8:
        return hasattr(ops.onednn, "qlinear_prepack") and hasattr(ops.onednn, "qlinear_pointwise")
    if not (hasattr(ops.mkldnn, "_reorder_linear_weight") and hasattr(ops.mkldnn, "_linear_pointwise")):
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and bool(ops.mkldnn._is_mkldnn_bf16_supported())
    )
