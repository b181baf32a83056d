"""Linear layers that keep their weight quantized and dequantize it on every forward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .formats import QuantizedWeight
from .operator import dequantized


class OpaqueWeightLinear(nn.Module, ABC):
    """A linear layer whose weight is not a parameter: quantized, or packed for the CPU.

    No gradient reaches the weight.
    """

    bias: nn.Parameter | None

    def __init__(self, out_features: int, in_features: int, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features, self._dtype = out_features, in_features, dtype
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to compute in."""
        return self._dtype

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device that the weight is on."""

    @property
    def weight(self) -> Tensor:
        """A tensor on the meta device, for code that reads a layer's dtype and shape."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")

    @abstractmethod
    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in `dtype`, dequantized or unpacked."""

    def linear_state(self, weight: Tensor, prefix: str, keep_vars: bool) -> dict[str, Tensor]:
        """A state dict with the names of `nn.Linear`, for subclasses whose own tensors cannot be saved."""
        state = {f"{prefix}weight": weight}
        if self.bias is not None:
            state[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()
        return state


class QuantizedLinear(OpaqueWeightLinear):
    """A linear layer over a `QuantizedWeight`, whose tensors may be memory-mapped.

    It moves between devices like any layer; on a device without fp8 the weight keeps its codes as bytes. A
    change of dtype changes `dtype`, which it computes in, never the codes and scales.
    """

    quantized: QuantizedWeight

    def __init__(self, quantized: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(quantized.shape[0], quantized.shape[1], bias, dtype)
        self.quantized = quantized

    @property
    def device(self) -> torch.device:
        return self.quantized.device

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        return self.quantized.dequantize(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.matmul(x, None if self.bias is None else self.bias.to(x.device, x.dtype))

    def matmul(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., in] times the transposed weight, plus a bias [out] in x's dtype: [..., out].

        A weight on another device is copied to x's device for this call.
        """
        return F.linear(x, self._weight_for(x), bias)

    def _weight_for(self, x: Tensor) -> Tensor:
        """The weight in x's dtype, on x's device."""
        if torch.compiler.is_compiling():
            shape = [self.out_features, self.in_features]
            return dequantized(self.quantized.tensors(), self.quantized.description, shape, x.dtype, x.device)
        return self.quantized.moved_to(x.device).dequantize(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.quantized.label}, computed in {self.dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """What `to`, `cuda` and `half` call. Codes and scales must change their device only."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        super()._apply(fn, recurse=False)
        self.quantized = self.quantized.moved_to(probe.device)
        self._dtype = probe.dtype
        return self


def dequantize_layers(model: nn.Module, dtype: torch.dtype, only: str | None = None) -> None:
    """Replace quantized layers by `nn.Linear` with the weight in `dtype`.

    In the whole model, or `only` its child of that name: for hosts that read or write a layer's weight.
    """
    for parent in list(model.modules()) if only is None else [model]:
        for name, layer in list(parent.named_children()):
            if isinstance(layer, QuantizedLinear) and only in (None, name):
                dense = nn.Linear(
                    layer.in_features, layer.out_features, layer.bias is not None, device="meta"
                )
                dense.weight = nn.Parameter(layer.dense_weight(dtype), requires_grad=False)
                if layer.bias is not None:
                    dense.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
                setattr(parent, name, dense.train(layer.training))


def compute_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype that a linear layer of any kind computes in."""
    return layer.dtype if isinstance(layer, OpaqueWeightLinear) else _weight(layer).dtype


def device_of(layer: nn.Module) -> torch.device:
    """The device that a linear layer of any kind is on."""
    return layer.device if isinstance(layer, OpaqueWeightLinear) else _weight(layer).device


def _weight(layer: Any) -> Tensor:
    return layer.weight
