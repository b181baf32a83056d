"""Linear layers whose weights are no parameters; those that stay in memory as their file has them.

The forms themselves are in forms.py. Opening a file copies nothing, and each use makes one layer's numbers.
Layers whose weights were reordered for the processor are in packed.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .formats import QuantizedWeight


class OpaqueWeightLinear(nn.Module, ABC):
    """A linear layer that keeps its weight in another form than a parameter."""

    bias: nn.Parameter | None

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self._dtype = dtype

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to compute in."""
        return self._dtype

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weight is kept."""

    @property
    def weight(self) -> Tensor:
        """A tensor without memory (on the meta device), for code that asks for a layer's dtype and shape."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")

    @abstractmethod
    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight's numbers [out, in] in `dtype`, made anew."""


class QuantizedLinear(OpaqueWeightLinear):
    """A linear layer whose weight stays as the file has it and becomes numbers when it is used.

    What is kept are buffers, which may alias the mapped file. The layer moves between devices as any other,
    to one that has no fp8 with bytes in its place; a change of dtype changes what it computes in (`dtype`),
    never what is kept. No gradient reaches the weight.
    """

    def __init__(self, stored: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(stored.shape[0], stored.shape[1], dtype)
        self._keep(stored)
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)

    def _keep(self, stored: QuantizedWeight) -> None:
        """Keep a weight, in the place of one that was kept."""
        tensors = stored.tensors()
        self._form = stored.with_tensors({name: t.to("meta") for name, t in tensors.items()})
        self._form_name = repr(self._form)
        _FORMS[self._form_name] = self._form
        self._names = [f"stored_{name}" for name in tensors]
        self._buffers.clear()
        for name, tensor in zip(self._names, tensors.values(), strict=True):
            self.register_buffer(name, tensor)

    @property
    def stored(self) -> QuantizedWeight:
        """The weight as it is kept, where it is kept."""
        return _stored(self._form, self._kept())

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        return self.stored.dequantize(dtype)

    def weight_for(self, x: Tensor) -> Tensor:
        """The weight [out, in] that x is multiplied by, in its dtype and where it is.

        What is kept elsewhere is brought over for this once.
        """
        if torch.compiler.is_compiling():
            return _dense(self._kept(), self._form_name, x.dtype, x.device)
        return self.stored.to(x.device).dequantize(x.dtype)

    def _kept(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._names]

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, None if self.bias is None else self.bias.to(x.device, x.dtype))

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., in] times the transpose of the weight, plus a bias [out] that is where x is: [..., out]."""
        return F.linear(x, self.weight_for(x), bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self._form.label}, computed in {self.dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """What `to`, `cuda` and `half` come down to. A fp8 code must not become a bf16 number on the way."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        stored = self.stored
        if (fitting := stored.fit_for(probe.device)) is not stored:
            self._keep(fitting)
        kept, self._buffers = self._buffers, {}
        super()._apply(fn, recurse)
        self._buffers = {name: None if t is None else t.to(probe.device) for name, t in kept.items()}
        self._dtype = probe.dtype
        return self


_FORMS: dict[str, QuantizedWeight] = {}
"""Forms without their tensors, by all that they say of a weight."""


def _stored(form: QuantizedWeight, kept: Sequence[Tensor]) -> QuantizedWeight:
    """A weight of a form, from its tensors in the form's order."""
    return form.with_tensors(dict(zip(form.tensors(), kept, strict=True)))


@torch.library.custom_op("rectiflux::dense", mutates_args=())
def _dense(kept: Sequence[Tensor], form: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A stored weight's numbers on a device, as one operation to compilers.

    They would unroll the slices in which the numbers are made, and cannot read fp8 on every card.
    """
    numbers = _stored(_FORMS[form], kept).to(device).dequantize(dtype)
    return numbers.clone() if any(numbers is tensor for tensor in kept) else numbers


@_dense.register_fake
def _(kept: Sequence[Tensor], form: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(_FORMS[form].shape, dtype=dtype, device=device)


def dequantize_layers(model: nn.Module, dtype: torch.dtype, only: str | None = None) -> None:
    """Put torch's linear layers, with their numbers in `dtype`, in the place of stored ones.

    In all of the model, or only in the place of its child of that name. For hosts that read or write a
    layer's numbers, and so must find them there.
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
    """The dtype that a linear layer, kept in any form, computes in."""
    return layer.dtype if isinstance(layer, OpaqueWeightLinear) else _weight(layer).dtype


def device_of(layer: nn.Module) -> torch.device:
    """The device that a linear layer, kept in any form, is on."""
    return layer.device if isinstance(layer, OpaqueWeightLinear) else _weight(layer).device


def weight_count(module: nn.Module) -> int:
    """The numbers that a module holds, as parameters or otherwise; those on the meta device are none."""
    count = sum(p.numel() for p in module.parameters() if not p.is_meta)
    layers = (layer for layer in module.modules() if isinstance(layer, OpaqueWeightLinear))
    return count + sum(
        layer.in_features * layer.out_features for layer in layers if layer.device.type != "meta"
    )


def _weight(layer: Any) -> Tensor:
    return layer.weight
