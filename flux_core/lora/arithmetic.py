"""The terms of all adapters of one layer, gathered by kind: each module adds its kind to the outputs.

Numbers are buffers that no state dict holds, so that they follow the layer from device to device.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .names import Rows
from .terms import Terms, hadamard_product, kronecker_product, rotated

Placed = Sequence[tuple[Rows, Terms]]
"""Terms, and the rows of the layer's outputs that they change."""


def widened(matrix: Tensor, width: int) -> Tensor:
    """[..., width] from [..., fewer], filled up with zeros."""
    return F.pad(matrix, (0, width - matrix.shape[-1]))


class _Kept(nn.Module):
    """A module of tensors in lists, which torch has only for parameters."""

    def keep(self, name: str, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> None:
        for i, tensor in enumerate(tensors):
            self.register_buffer(f"{name}{i}", None if tensor is None else tensor.to(dtype), persistent=False)

    def kept(self, name: str, index: int) -> Tensor:
        return cast(Tensor, getattr(self, f"{name}{index}"))

    def optional(self, name: str, index: int) -> Tensor | None:
        return cast("Tensor | None", getattr(self, f"{name}{index}"))


class LowRankStack(_Kept):
    """All pairs in one product down to the sum of their ranks, and one up for each piece of the outputs."""

    def __init__(self, placed: Placed, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        by_rows: dict[Rows, list[tuple[Tensor, Tensor]]] = {}
        for rows, terms in placed:
            by_rows.setdefault(rows, []).extend(terms.low_rank)
        downs: list[Tensor] = []
        ups: list[Tensor] = []
        self.pieces: list[tuple[slice, slice]] = []
        first = 0
        for (start, count), pairs in by_rows.items():
            if pairs:
                downs += [widened(down, width) for down, _ in pairs]
                ups.append(torch.cat([up for _, up in pairs], dim=1))
                stop = first + ups[-1].shape[1]
                self.pieces.append((slice(start, start + count), slice(first, stop)))
                first = stop
        self.keep("down", [torch.cat(downs)], dtype)
        self.keep("up", ups, dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y [n, out] with the products of x [n, in] added in place."""
        low = F.linear(x, self.kept("down", 0).to(x.dtype))
        for i, (rows, ranks) in enumerate(self.pieces):
            y[:, rows].addmm_(low[:, ranks], self.kept("up", i).to(x.dtype).mT)
        return y


class DenseSum(_Kept):
    """Whole changes, summed for each piece of the outputs."""

    def __init__(self, placed: Placed, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        sums: dict[Rows, Tensor] = {}
        for rows, terms in placed:
            for change in terms.dense:
                wide = widened(change, width)
                sums[rows] = sums[rows] + wide if rows in sums else wide
        self.rows = list(sums)
        self.keep("change", list(sums.values()), dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for i, (start, count) in enumerate(self.rows):
            y[:, start : start + count].addmm_(x, self.kept("change", i).to(x.dtype).mT)
        return y


class HadamardSum(_Kept):
    """Elementwise products of two low-rank matrices, kept as their factors."""

    def __init__(self, placed: Placed, dtype: torch.dtype) -> None:
        super().__init__()
        found = [(rows, term) for rows, terms in placed for term in terms.hadamard]
        self.rows = [rows for rows, _ in found]
        self.keep("down1_", [term.down1 for _, term in found], dtype)
        self.keep("up1_", [term.up1 for _, term in found], dtype)
        self.keep("down2_", [term.down2 for _, term in found], dtype)
        self.keep("up2_", [term.up2 for _, term in found], dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for i, (start, count) in enumerate(self.rows):
            factors = [self.kept(name, i).to(x.dtype) for name in ("down1_", "up1_", "down2_", "up2_")]
            y[:, start : start + count] += hadamard_product(x[:, : factors[0].shape[1]], *factors)
        return y


class KroneckerSum(_Kept):
    """Kronecker products, by reshaping."""

    def __init__(self, placed: Placed, dtype: torch.dtype) -> None:
        super().__init__()
        found = [(rows, term) for rows, terms in placed for term in terms.kronecker]
        self.rows = [rows for rows, _ in found]
        self.keep("first", [term.first for _, term in found], dtype)
        self.keep("second", [term.second for _, term in found], dtype)
        self.keep("in_gain", [term.in_gain for _, term in found], dtype)
        self.keep("out_gain", [term.out_gain for _, term in found], dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for i, (start, count) in enumerate(self.rows):
            first, second = self.kept("first", i).to(x.dtype), self.kept("second", i).to(x.dtype)
            inner = x[:, : first.shape[1] * second.shape[1]]
            in_gain, out_gain = self.optional("in_gain", i), self.optional("out_gain", i)
            if in_gain is not None:
                inner = inner * in_gain.to(x.dtype)
            product = kronecker_product(inner, first, second)
            if out_gain is not None:
                product = product * out_gain.to(x.dtype)
            y[:, start : start + count] += product
        return y


class Turns(_Kept):
    """What acts on the base's product W x: rotations, and gains of the outputs."""

    def __init__(self, placed: Placed, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        found = [(rows, term) for rows, terms in placed for term in terms.rotation]
        self.turns = [(rows, term.butterfly, term.strength) for rows, term in found]
        self.keep("stages", [term.stages for _, term in found], dtype)
        self.keep("gain", [term.gain for _, term in found], dtype)
        total: Tensor | None = None
        for (start, count), terms in placed:
            if terms.output_gain is not None:
                total = torch.zeros(out_features) if total is None else total
                total[start : start + count] += terms.output_gain
        self.keep("output_gain", [total], dtype)

    def forward(self, wx: Tensor, y: Tensor) -> Tensor:
        if (gain := self.optional("output_gain", 0)) is not None:
            y = torch.addcmul(y, wx, gain.to(y.dtype))
        for i, ((start, count), butterfly, strength) in enumerate(self.turns):
            piece = wx[:, start : start + count]
            turned = rotated(piece, self.kept("stages", i).to(y.dtype), butterfly)
            if (gain := self.optional("gain", i)) is not None:
                turned = turned * gain.to(y.dtype)
            y[:, start : start + count] += strength * (turned - piece)
        return y


class InputGains(_Kept):
    """Gains of the inputs, one for each stretch of rows in which the same adapters act."""

    def __init__(self, placed: Placed, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        found = [(rows, terms.input_gain) for rows, terms in placed if terms.input_gain is not None]
        edges = {0, out_features} | {edge for (start, count), _ in found for edge in (start, start + count)}
        self.stretches = list(pairwise(sorted(edges)))
        sums: list[Tensor] = []
        for first, stop in self.stretches:
            total = torch.zeros(in_features)
            for (start, count), gain in found:
                if start <= first and stop <= start + count:
                    total = total + gain[:in_features]
            sums.append(total)
        self.keep("gain", sums, dtype)

    def scaled(self, x: Tensor, index: int, base: float) -> Tensor:
        """x times (base + the gain of one stretch)."""
        return x * (base + self.kept("gain", index).to(x.dtype))
