"""Linear layers with weights packed for the CPU (onednn.py), exact to rounding.

A layer keeps only the packed weight, so memory does not double, and applies GELU inside the matmul or after
it in place, whichever is faster on the CPU. cpu_pack.py decides which layers of a model are packed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant.linear import OpaqueWeightLinear
from .cpu_gelu import gelu
from .cpu_info import has_avx512
from .onednn import PackedWeight, can_pack, packed_operator


class CPULinear(OpaqueWeightLinear):
    """A linear layer with a weight packed for the CPU, and with GELU (tanh) of its outputs."""

    qkv_dim: int
    """The number of outputs that `split_gelu` leaves unchanged: a single block's queries, keys and values."""

    def gelu(self, x: Tensor) -> Tensor:
        """GELU of the outputs."""
        return F.gelu(self(x), approximate="tanh")

    def split_gelu(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The first `qkv_dim` outputs unchanged, and GELU of the rest."""
        y = self(x)
        return y[..., : self.qkv_dim], F.gelu(y[..., self.qkv_dim :], approximate="tanh")

    def state_dict(
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        """That of `nn.Linear`: a packed weight cannot be saved."""
        destination = {} if destination is None else destination
        destination.update(self.linear_state(self.dense_weight(self.dtype), prefix, keep_vars))
        return destination


class PackedLinear(CPULinear):
    """A linear layer with its weight in oneDNN's layout; with `qkv_dim`, in two parts at that row.

    The weight stays in rows on other devices and in other dtypes. For inputs that need a gradient, it is
    unpacked at each call.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, qkv_dim: int | None = None) -> None:
        super().__init__(weight.shape[0], weight.shape[1], bias, weight.dtype)
        self.qkv_dim = weight.shape[0] if qkv_dim is None else qkv_dim
        self._set_weight(weight.detach())

    def _set_weight(self, weight: Tensor) -> None:
        """Pack a weight [out, in], or keep its rows where it cannot be packed."""
        self._device, self._dtype = weight.device, weight.dtype
        self._rows: Tensor | None = None
        self._parts: list[PackedWeight] = []
        if can_pack(weight.device, weight.dtype):
            reorder = torch.ops.mkldnn._reorder_linear_weight
            parts = [weight[: self.qkv_dim], weight[self.qkv_dim :]]
            self._parts = [PackedWeight(reorder(part.contiguous(), None)) for part in parts if len(part)]
        else:
            self._rows = weight

    @property
    def packed(self) -> bool:
        """Whether the weight is in oneDNN's layout."""
        return self._rows is None

    @property
    def device(self) -> torch.device:
        return self._device

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        if self._rows is not None:
            return self._rows.to(dtype)
        rows = [part.opaque.to_dense() for part in self._parts]
        return (rows[0] if len(rows) == 1 else torch.cat(rows)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not self._can_multiply(x):
            return F.linear(x, self.dense_weight(x.dtype), self.bias)
        parts = [self._matmul(i, x) for i in range(len(self._parts))]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def gelu(self, x: Tensor) -> Tensor:
        if len(self._parts) == 1 and self._can_multiply(x):
            return self._gelu_matmul(0, x)
        return super().gelu(x)

    def split_gelu(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if len(self._parts) == 2 and self._can_multiply(x):
            return self._matmul(0, x), self._gelu_matmul(1, x)
        return super().split_gelu(x)

    def extra_repr(self) -> str:
        layout = "packed" if self.packed else "in rows"
        return f"{self.in_features}, {self.out_features}, {self.dtype}, {layout}"

    def _can_multiply(self, x: Tensor) -> bool:
        """Whether the packed weight can be multiplied by x."""
        return self.packed and x.dtype == self.dtype and x.numel() > 0 and not x.requires_grad

    def _gelu_matmul(self, part: int, x: Tensor) -> Tensor:
        """GELU of a part's outputs.

        With AVX-512 inside the matmul, while they are in the cache. With AVX2 alone oneDNN's tanh is slower
        than elementwise ops over slices: 208 against 161 ms from 3072 to 12288 for 256 tokens. In compiled
        code it is always one operator.
        """
        if torch.compiler.is_compiling() or has_avx512():
            return self._matmul(part, x, "gelu")
        y = self._matmul(part, x)
        return gelu(y, out=y)

    def _matmul(self, part: int, x: Tensor, activation: str = "none") -> Tensor:
        bias = self.bias
        if bias is not None and len(self._parts) == 2:
            bias = bias[: self.qkv_dim] if part == 0 else bias[self.qkv_dim :]
        if torch.compiler.is_compiling():
            outputs = self.qkv_dim if part == 0 else self.out_features - self.qkv_dim
            return packed_linear(x, self._parts[part], bias, outputs, activation)
        return _linear(x, self._parts[part], bias, activation)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """What `to`, `cuda` and `half` call."""
        super()._apply(fn, recurse)
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if probe.dtype != self.dtype or probe.device != self.device:
            self._set_weight(fn(self.dense_weight(self.dtype)))
        return self


def _linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str) -> Tensor:
    how = "tanh" if activation == "gelu" else ""
    return torch.ops.mkldnn._linear_pointwise(x, weight.opaque, bias, activation, [], how)


def _like_linear(x: Tensor, weight: Any, bias: Tensor | None, outputs: int, activation: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


@packed_operator("rectiflux::packed_linear", _like_linear)
def packed_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, outputs: int, activation: str
) -> Tensor:
    """x [..., in] times a packed weight [outputs, in], plus a bias, then an activation: "none" or "gelu"."""
    return _linear(x, weight, bias, activation)
