"""DoRA (arXiv:2402.09353, equation 5): g * (W + delta) - W, with g that gives rows or columns new lengths."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from .adapter import Adapter, OutputChange, Roles, Weight, need, swap_halves
from .additive import Additive


class DoRA(Adapter):
    """The merged weight's rows or columns are given the lengths `magnitude`, [rows, 1] or [1, in].

    The lengths that are replaced are the merged weight's, as in the paper, LyCORIS and PEFT. (ComfyUI takes
    the base's for [rows, 1].) A strength between 0 and 1 interpolates from W to the result, as in ComfyUI.
    """

    inner: Additive
    magnitude: Tensor

    def __init__(self, inner: Additive, magnitude: Tensor) -> None:
        super().__init__(magnitude=magnitude)
        self.inner = inner

    @classmethod
    def read(cls, roles: Roles, inner: Additive) -> DoRA:
        """The inner adapter with its layer's `dora_scale`; a flat vector has a length for each row (PEFT)."""
        magnitude, (rows, width) = need(roles, "dora_scale"), inner.shape
        if magnitude.numel() == rows and (magnitude.ndim == 1 or magnitude.shape[0] == rows):
            return cls(inner, magnitude.reshape(rows, 1))
        if magnitude.numel() == width and magnitude.ndim > 1 and magnitude.shape[0] == 1:
            return cls(inner, magnitude.reshape(1, width))
        raise ValueError(f"dora_scale {[*magnitude.shape]} fits neither {rows} rows nor {width} columns")

    @property
    def kind(self) -> str:
        return f"DoRA of {self.inner.kind}"

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    @property
    def by_rows(self) -> bool:
        return tuple(self.magnitude.shape) == (self.shape[0], 1)

    def _merged(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """W + delta, and g = magnitude / length [rows, 1] or [1, in], both float32."""
        merged = weight.float() + self.inner.change()
        length = torch.linalg.vector_norm(merged, dim=1 if self.by_rows else 0, keepdim=True)
        return merged, self.magnitude.float() / (length + torch.finfo(torch.float32).eps)

    def delta(self, weight: Tensor) -> Tensor:
        merged, gain = self._merged(weight)
        return (gain * merged - weight.float()).to(weight.dtype)

    def attached(self, strength: float, weight: Weight) -> RowGains | ColumnGains:
        gain = self._merged(weight())[1].flatten()
        kind = RowGains if self.by_rows else ColumnGains
        return kind(self.inner.attached(1.0, weight), strength * (gain - 1), strength * gain)

    def swapped(self) -> DoRA:
        magnitude = swap_halves(self.magnitude) if self.by_rows else self.magnitude
        return DoRA(cast(Additive, self.inner.swapped()), magnitude)


class Gains(OutputChange):
    """s (g - 1) times W x, or W times x, and s g times the output, or the input, of the inner adapter."""

    base_gain: Tensor
    gain: Tensor

    def __init__(self, inner: OutputChange, base_gain: Tensor, gain: Tensor) -> None:
        super().__init__(base_gain=base_gain, gain=gain)
        self.inner = inner


class RowGains(Gains):
    """DoRA by rows, attached: gains [rows] of outputs."""

    reads_output = True

    def forward(self, x: Tensor, wx: Tensor | None) -> Tensor:
        change = self.inner(x, None) * self.gain.to(x.dtype)
        return torch.addcmul(change, cast(Tensor, wx), self.base_gain.to(x.dtype))


class ColumnGains(Gains):
    """DoRA by columns, attached: gains [in] of inputs. The layer adds W (base_gain * x)."""

    def forward(self, x: Tensor, wx: Tensor | None) -> Tensor:
        return self.inner(x * self.gain.to(x.dtype), None)
