"""A linear layer with adapters, which shares the base layer's weight.

The base may be any layer with `in_features`, `out_features`, `bias` and a weight that is dense or can be
dequantized. Adapters are never merged into it, so a quantized weight stays quantized and the base unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.names import Rows
from .adapter import Adapter, OutputChange
from .additive import LoRA
from .dora import ColumnGains

_CPU = torch.device("cpu")


def dense_weight(layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [out, in] of a linear layer in `dtype` (its own unless given), dequantized where necessary.

    A layer with a quantized or packed weight has a method `dense_weight(dtype)`. Raises TypeError for a layer
    that has neither it nor a two-dimensional floating-point weight.
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
    """What one LoRA file does to a layer: its adapter, on some rows or all, and its change of the bias."""

    adapter: Adapter | None
    rows: Rows | None
    bias: Tensor | None
    strength: float


class LoRAStack(nn.Module):
    """Plain LoRAs together: one matmul down to the sum of their ranks, one up for each range of rows.

    `pairs` are (rows that are changed, down [r, in], up [rows, r]); a `down` that reads fewer than `width`
    inputs reads the first ones.
    """

    def __init__(self, pairs: Sequence[tuple[Rows, Tensor, Tensor]], width: int, dtype: torch.dtype) -> None:
        super().__init__()
        by_rows: dict[Rows, list[tuple[Tensor, Tensor]]] = {}
        for rows, down, up in pairs:
            by_rows.setdefault(rows, []).append((_widened(down, width), up))
        self.slices: list[tuple[slice, slice]] = []
        first = 0
        for i, ((start, count), members) in enumerate(by_rows.items()):
            up = torch.cat([up for _, up in members], dim=1)
            self.register_buffer(f"up{i}", up.to(dtype), persistent=False)
            self.slices.append((slice(start, start + count), slice(first, first + up.shape[1])))
            first += up.shape[1]
        downs = [down for members in by_rows.values() for down, _ in members]
        self.down: Tensor
        self.register_buffer("down", torch.cat(downs).to(dtype), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y [n, out] with the changes for x [n, in] added in place."""
        low = F.linear(x, self.down.to(x.dtype))
        for i, (rows, ranks) in enumerate(self.slices):
            y[:, rows].addmm_(low[:, ranks], getattr(self, f"up{i}").to(x.dtype).mT)
        return y


class AdaptedLinear(nn.Module):
    """`base` and the sum of what its parts change: y = W x + b + sum of strength * (delta x + delta_b).

    Tensors of adapters are in `dtype`. Where an adapter reads more inputs than the base has (`img_in` of a
    control LoRA), so does this layer; the base reads the first of them.
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
        self._attach()

    @property
    def device(self) -> torch.device:
        """Where the base computes."""
        return next((tensor.device for tensor in (*self.base.parameters(), *self.base.buffers())), _CPU)

    @property
    def weight(self) -> Tensor:
        """The base's weight where it is dense and resident, for code that asks for its dtype and device.

        Else an expanded tensor of one element, in the dtype of the adapters.
        """
        weight = getattr(self.base, "weight", None)
        if isinstance(weight, Tensor) and weight.device == self.device:
            return weight
        empty = torch.empty((), dtype=self._dtype, device=self.device)
        return empty.expand(self.out_features, self.in_features)

    @property
    def bias(self) -> Tensor | None:
        """The bias with what the parts add to it."""
        bias, change = _bias(self.base), self.bias_change
        return bias if change is None else change if bias is None else bias + change.to(bias.dtype)

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] of a plain layer with the same outputs."""
        base = _widened(dense_weight(self.base, dtype), self.in_features)
        merged = base.clone()
        for part in self.parts:
            if part.adapter is not None:
                start, count = self._rows(part)
                width = part.adapter.shape[1] or self.in_features
                change = part.adapter.delta(base[start : start + count, :width].cpu())
                merged[start : start + count, :width] += part.strength * change.to(merged.device)
        return merged

    # Attaching

    def _attach(self) -> None:
        """Stack the plain LoRAs, list the other adapters' changes, add up those of the bias."""
        self.changes, self._places = nn.ModuleList(), []
        pairs: list[tuple[Rows, Tensor, Tensor]] = []
        bias = torch.zeros(self.out_features)
        for part in self.parts:
            start, count = rows = self._rows(part)
            if part.bias is not None:
                bias[start : start + count] += part.strength * part.bias
            if part.adapter is None:
                continue
            change = part.adapter.attached(part.strength, partial(self._base_weight, start, start + count))
            if isinstance(change, LoRA):
                pairs.append((rows, change.down, change.up))
            else:
                self.changes.append(change.to(self.device, self._dtype))
                self._places.append((start, start + count, part.adapter.shape[1] or self.in_features))
        self.stack = LoRAStack(pairs, self.in_features, self._dtype).to(self.device) if pairs else None
        changes_bias = any(part.bias is not None for part in self.parts)
        self.bias_change: Tensor | None
        self.register_buffer(
            "bias_change", bias.to(self.device, self._dtype) if changes_bias else None, persistent=False
        )
        self._reads_output = any(cast(OutputChange, change).reads_output for change in self.changes)
        self._gained = self._gained_rows()

    def _rows(self, part: Part) -> Rows:
        return part.rows or (0, self.out_features)

    def _base_weight(self, start: int, stop: int) -> Tensor:
        """Rows of the base's weight, float32 on the CPU."""
        return _widened(dense_weight(self.base, torch.float32), self.in_features)[start:stop].cpu()

    def _gained_rows(self) -> list[tuple[int, int, list[int]]]:
        """Ranges of rows (first, stop), and the changes whose gains of the inputs apply to each.

        Empty without such gains (DoRA by columns).
        """
        found = [(i, *self._places[i][:2]) for i, c in enumerate(self.changes) if isinstance(c, ColumnGains)]
        edges = {0, self.out_features}.union(*({start, stop} for _, start, stop in found))
        return [
            (first, stop, [i for i, start, end in found if start <= first and stop <= end])
            for first, stop in pairwise(sorted(edges))
            if found
        ]

    # At every call

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"a layer with this LoRA reads {self.in_features} values, got {x.shape[-1]}; "
                "a control LoRA needs the control image's latent behind the noise"
            )
        inputs = x.reshape(-1, x.shape[-1])
        inner = inputs[:, : self._base_inputs]
        y = self._with_gains(inner) if self._gained else self.base(inner)
        wx: Tensor | None = None
        if self._reads_output:
            own, bias = self.base(inner) if self._gained else y, _bias(self.base)
            wx = own.clone() if bias is None else own - bias.to(own.dtype)
        for change, (start, stop, width) in zip(self.changes, self._places, strict=True):
            y[:, start:stop] += change(inputs[:, :width], None if wx is None else wx[:, start:stop])
        if self.stack is not None:
            y = self.stack(inputs, y)
        if self.bias_change is not None:
            y = y + self.bias_change.to(y.dtype)
        return y.unflatten(0, x.shape[:-1])

    def _with_gains(self, x: Tensor) -> Tensor:
        """W ((1 + gains) * x) + b: as much work as the base's own matmul."""

        def scaled(members: list[int]) -> Tensor:
            gains = [cast(ColumnGains, self.changes[i]).base_gain[: x.shape[1]] for i in members]
            return x * (1 + torch.stack(gains).sum(0)).to(x.dtype) if gains else x

        if len(self._gained) == 1:
            return self.base(scaled(self._gained[0][2]))
        weight = dense_weight(self.base, x.dtype)
        pieces = [F.linear(scaled(members), weight[start:stop]) for start, stop, members in self._gained]
        y, bias = torch.cat(pieces, dim=-1), _bias(self.base)
        return y if bias is None else y + bias.to(y.dtype)


def _bias(layer: nn.Module) -> Tensor | None:
    return cast("Tensor | None", layer.bias)


def _widened(weight: Tensor, width: int) -> Tensor:
    """[..., width] from [..., fewer], padded with zeros."""
    return F.pad(weight, (0, width - weight.shape[-1]))
