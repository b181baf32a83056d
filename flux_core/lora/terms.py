"""What adapters add to a linear layer's output, as the few kinds of arithmetic that it takes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class KroneckerTerm:
    """out_gain * ((first (x) second) (in_gain * x)), with gains None for 1."""

    first: Tensor
    second: Tensor
    in_gain: Tensor | None = None
    out_gain: Tensor | None = None


@dataclass(frozen=True, eq=False)
class HadamardTerm:
    """(up1 down1) * (up2 down2) as its four factors, ups [rows, r], downs [r, in]."""

    down1: Tensor
    up1: Tensor
    down2: Tensor
    up2: Tensor


@dataclass(frozen=True, eq=False)
class RotationTerm:
    """strength (gain * R W x - W x): `stages` [m, k, n, n] are the factors of R, `gain` [rows] or None."""

    stages: Tensor
    butterfly: bool
    gain: Tensor | None
    strength: float


@dataclass(frozen=True, eq=False)
class Terms:
    """The sum of its parts, float32. W x is the base's product without the bias.

    `low_rank` pairs (down [r, in], up [rows, r]), `hadamard`, `kronecker` and `dense` [rows, in] act on x;
    `input_gain` [in] adds W (input_gain * x), `output_gain` [rows] output_gain * W x; `rotation` turns W x.
    """

    low_rank: tuple[tuple[Tensor, Tensor], ...] = ()
    hadamard: tuple[HadamardTerm, ...] = ()
    kronecker: tuple[KroneckerTerm, ...] = ()
    dense: tuple[Tensor, ...] = ()
    input_gain: Tensor | None = field(default=None)
    output_gain: Tensor | None = field(default=None)
    rotation: tuple[RotationTerm, ...] = ()

    def scaled_outputs(self, gain: Tensor) -> Terms:
        """What acts on x, its outputs multiplied by gain [rows]."""
        return replace(
            self,
            low_rank=tuple((down, gain[:, None] * up) for down, up in self.low_rank),
            hadamard=tuple(replace(term, up1=gain[:, None] * term.up1) for term in self.hadamard),
            kronecker=tuple(replace(term, out_gain=gain) for term in self.kronecker),
            dense=tuple(gain[:, None] * change for change in self.dense),
        )

    def scaled_inputs(self, gain: Tensor) -> Terms:
        """What acts on x, acting on gain [in] * x."""
        return replace(
            self,
            low_rank=tuple((gain * down, up) for down, up in self.low_rank),
            hadamard=tuple(replace(term, down1=gain * term.down1) for term in self.hadamard),
            kronecker=tuple(replace(term, in_gain=gain) for term in self.kronecker),
            dense=tuple(gain * change for change in self.dense),
        )


def kronecker_product(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """(first (x) second) x over the last dim of x [..., c1 c2] -> [..., r1 r2], the cheaper factor first."""
    (r1, c1), (r2, c2) = first.shape, second.shape
    grid = x.unflatten(-1, (c1, c2))
    if c1 * c2 * r2 + c1 * r1 * r2 <= c1 * c2 * r1 + c2 * r1 * r2:
        out = first @ (grid @ second.mT)
    else:
        out = (first @ grid) @ second.mT
    return out.flatten(-2)


def hadamard_product(x: Tensor, down1: Tensor, up1: Tensor, down2: Tensor, up2: Tensor) -> Tensor:
    """((up1 down1) * (up2 down2)) x over the last dim of x [n, in] -> [n, rows].

    The product has rank r1 r2 at most, by its rows' and columns' Khatri-Rao factors: two thin products where
    that is less work than one with the dense change. Either is made anew at every call, because it is many
    times as large as the four factors.
    """
    rank, (rows, width) = down1.shape[0] * down2.shape[0], (up1.shape[0], down1.shape[1])
    if rank * (rows + width) >= rows * width:
        return x @ ((up1 @ down1) * (up2 @ down2)).mT
    down = (down1[:, None] * down2[None]).flatten(0, 1)
    up = (up1[:, :, None] * up2[:, None]).flatten(1)
    return x @ down.mT @ up.mT


def rotated(wx: Tensor, stages: Tensor, butterfly: bool) -> Tensor:
    """R wx over the last dim of wx [..., rows], each stage [k, n, n] a block-diagonal matrix.

    OFT has one stage. BOFT's stage i joins outputs that lie 2^i n/2 apart (LyCORIS boft.py).
    """
    n = stages.shape[-1]
    for i, blocks in enumerate(stages):
        if not butterfly:
            grid = wx.unflatten(-1, (-1, n))
            wx = torch.einsum("kij,...kj->...ki", blocks, grid).flatten(-2)
            continue
        apart = 2**i * (n // 2)
        grid = wx.unflatten(-1, (-1, 2, apart)).transpose(-2, -1).flatten(-3).unflatten(-1, (-1, n))
        turned = torch.einsum("kij,...kj->...ki", blocks, grid).flatten(-2)
        wx = turned.unflatten(-1, (-1, apart, 2)).transpose(-2, -1).flatten(-3)
    return wx
