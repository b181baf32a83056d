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
class RotationTerm:
    """strength (gain * R W x - W x): `stages` [m, k, n, n] are the factors of R, `gain` [rows] or None."""

    stages: Tensor
    butterfly: bool
    gain: Tensor | None
    strength: float


@dataclass(frozen=True, eq=False)
class Terms:
    """The sum of its parts, float32. W x is the base's product without the bias.

    `low_rank` pairs (down [r, in], up [rows, r]), `kronecker` and `dense` [rows, in] act on x; `input_gain`
    [in] adds W (input_gain * x); `output_gain` [rows] adds output_gain * W x; `rotation` turns W x.
    """

    low_rank: tuple[tuple[Tensor, Tensor], ...] = ()
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
            kronecker=tuple(replace(term, out_gain=gain) for term in self.kronecker),
            dense=tuple(gain[:, None] * change for change in self.dense),
        )

    def scaled_inputs(self, gain: Tensor) -> Terms:
        """What acts on x, acting on gain [in] * x."""
        return replace(
            self,
            low_rank=tuple((gain * down, up) for down, up in self.low_rank),
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
