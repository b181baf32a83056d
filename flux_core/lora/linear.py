"""A linear layer with adapters: it shares the base's numbers, and adds what the adapters change.

The base may be any layer with `in_features`, `out_features`, `bias` and a weight that is dense or can be made
so: its weight is never merged, so a quantised one stays quantised, and the base model stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapters import Adapter
from .arithmetic import DenseSum, HadamardSum, InputGains, KroneckerSum, LowRankStack, Turns, widened
from .names import Rows

_CPU = torch.device("cpu")


def dense_weight(layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [out, in] of a linear layer in `dtype` (its own unless given), dequantised where need be.

    A layer that keeps its weight in another form has a method `dense_weight(dtype)`. Raises TypeError for a
    layer that has neither it nor a weight of numbers in two dims.
    """
    if hasattr(layer, "dense_weight"):
        return cast(Any, layer).dense_weight(dtype or torch.float32)
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise TypeError(f"a linear layer with a dense weight is needed, got {type(layer).__name__}")
    return weight if dtype is None else weight.to(dtype)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer to which adapters can be attached."""
    return isinstance(module, nn.Linear) or hasattr(module, "dense_weight")


@dataclass(frozen=True, eq=False)
class Part:
    """What one LoRA does to a layer: its adapter (on some rows, or all) and its change of the bias."""

    adapter: Adapter | None
    rows: Rows | None
    bias: Tensor | None
    strength: float


class AdaptedLinear(nn.Module):
    """`base` and the sum of what its parts change: y = W x + b + sum of strength * (delta x + delta_b).

    Low-rank parts of all LoRAs are stacked into one product down, and one up for each piece of the outputs.
    Numbers are kept in `dtype`. Where a part reads more inputs than the base has (a control LoRA's `img_in`),
    the layer reads as many, the base the first of them.
    """

    def __init__(self, base: nn.Module, parts: Sequence[Part], dtype: torch.dtype) -> None:
        super().__init__()
        if isinstance(base, AdaptedLinear):
            base, parts = base.base, [*base.parts, *parts]
        self.base = base
        self.parts = tuple(parts)
        self.out_features = int(cast(Any, base).out_features)
        self._base_inputs = int(cast(Any, base).in_features)
        widths = [part.adapter.shape[1] for part in parts if part.adapter is not None]
        self.in_features = max([self._base_inputs, *widths])
        self._dtype = dtype
        self._compile(dtype)

    @property
    def device(self) -> torch.device:
        """Where the base computes."""
        return next((tensor.device for tensor in (*self.base.parameters(), *self.base.buffers())), _CPU)

    @property
    def weight(self) -> Tensor:
        """What a layer's dtype and device are read from: the base's weight, where that is dense and there.

        Else numbers without memory or meaning, in the dtype that the adapters are kept in.
        """
        weight = getattr(self.base, "weight", None)
        if isinstance(weight, Tensor) and weight.device == self.device:
            return weight
        empty = torch.empty((), dtype=self._dtype, device=self.device)
        return empty.expand(self.out_features, self.in_features)

    @property
    def bias(self) -> Tensor | None:
        """The bias with what the parts add to it."""
        bias = cast("Tensor | None", self.base.bias)
        change = cast("Tensor | None", self.bias_change)
        return bias if change is None else change if bias is None else bias + change.to(bias.dtype)

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] that a plain layer would need to give the same outputs."""
        base = widened(dense_weight(self.base, dtype), self.in_features)
        merged = base.clone()
        for part in self.parts:
            if part.adapter is not None:
                start, count = part.rows or (0, self.out_features)
                width = part.adapter.shape[1] or self.in_features
                change = part.adapter.delta(base[start : start + count, :width].cpu())
                merged[start : start + count, :width] += part.strength * change.to(merged.device)
        return merged

    # Once, when attached

    def _compile(self, dtype: torch.dtype) -> None:
        """The parts' terms, gathered by kind."""
        placed = [
            (part.rows or (0, self.out_features), part.adapter.terms(part.strength, self._rows_of(part)))
            for part in self.parts
            if part.adapter is not None
        ]
        every = [terms for _, terms in placed]
        width, inputs, outputs = self.in_features, self._base_inputs, self.out_features
        self.adding = nn.ModuleList()  # what acts on x
        if any(terms.low_rank for terms in every):
            self.adding.append(LowRankStack(placed, width, dtype))
        if any(terms.hadamard for terms in every):
            self.adding.append(HadamardSum(placed, dtype))
        if any(terms.kronecker for terms in every):
            self.adding.append(KroneckerSum(placed, dtype))
        if any(terms.dense for terms in every):
            self.adding.append(DenseSum(placed, width, dtype))
        turned = any(terms.rotation or terms.output_gain is not None for terms in every)
        self.turns = Turns(placed, outputs, dtype) if turned else None
        gained = any(terms.input_gain is not None for terms in every)
        self.gains = InputGains(placed, inputs, outputs, dtype) if gained else None
        self.register_buffer("bias_change", self._bias_change(dtype), persistent=False)
        self._follow_base()

    def _rows_of(self, part: Part) -> Callable[[], Tensor]:
        """The base's rows that a part changes, float32 on the CPU, made when asked for."""

        def rows() -> Tensor:
            start, count = part.rows or (0, self.out_features)
            return dense_weight(self.base, torch.float32)[start : start + count].cpu()

        return rows

    def _bias_change(self, dtype: torch.dtype) -> Tensor | None:
        if all(part.bias is None for part in self.parts):
            return None
        change = torch.zeros(self.out_features)
        for part in self.parts:
            if part.bias is not None:
                start, count = part.rows or (0, self.out_features)
                change[start : start + count] += part.strength * part.bias
        return change.to(dtype)

    def _follow_base(self) -> None:
        """Move what was compiled to where the base computes."""
        for module in (self.adding, self.turns, self.gains):
            if module is not None:
                module.to(self.device)
        if self.bias_change is not None:
            self.bias_change = cast(Tensor, self.bias_change).to(self.device)

    # At every call

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"a layer with this LoRA reads {self.in_features} values, got {x.shape[-1]}; "
                "a control LoRA needs the control picture's latent behind the noise"
            )
        inputs = x.reshape(-1, x.shape[-1])
        inner = inputs[:, : self._base_inputs]
        if self.gains is None:
            y = self.base(inner)
        elif self.turns is None:
            y = self._gained(inner, 1.0)
        else:  # two kinds of DoRA on one layer: the base's own product is needed as it is
            y = self.base(inner)
        if self.turns is not None:
            own = cast("Tensor | None", self.base.bias)
            wx = y if own is None else y - own.to(y.dtype)
            y = self.turns(wx, y.clone())
            if self.gains is not None:
                y = y + self._gained(inner, 0.0)
        for adding in self.adding:
            y = adding(inputs, y)
        if self.bias_change is not None:
            y = y + cast(Tensor, self.bias_change).to(y.dtype)
        return y.unflatten(0, x.shape[:-1])

    def _gained(self, x: Tensor, base: float) -> Tensor:
        """W ((base + gain) * x), with the bias when `base` is 1: as much work as the base's own product."""
        gains = cast(InputGains, self.gains)
        if len(gains.stretches) == 1 and base == 1.0:
            return self.base(gains.scaled(x, 0, base))
        weight = dense_weight(self.base, x.dtype)
        pieces = [
            F.linear(gains.scaled(x, i, base), weight[start:stop])
            for i, (start, stop) in enumerate(gains.stretches)
        ]
        y, bias = torch.cat(pieces, dim=-1), cast("Tensor | None", self.base.bias)
        return y if bias is None or base == 0.0 else y + bias.to(y.dtype)
