"""Orthogonal fine-tuning: a layer's outputs rotated, in blocks (OFT) or in butterfly stages (BOFT)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from .adapter import Adapter, OutputChange, Roles, Weight, alpha_of, need


class OFT(Adapter):
    """rescale * R W instead of W: `blocks` [k, n, n] (OFT) or [m, k, n, n] (BOFT), `rescale` [rows] or None.

    Each block X makes Q = X - X^T and, by Cayley, (I + Q)(I - Q)^-1 (arXiv:2306.07280, section 3.2; BOFT:
    arXiv:2311.06243). LyCORIS applies OFT's transposed (diag_oft.py make_weight) and BOFT's as it is.
    `constraint`, above 0, bounds the length of Q by constraint * rows. Only W is rotated, not the bias. At
    strength s the change is s times the whole change. (LyCORIS leaves `rescale` outside of s; ComfyUI takes s
    squared for OFT, and no rescale.)
    """

    roles = frozenset({"oft_blocks", "rescale"})
    rowwise = ("blocks", "rescale")
    blocks: Tensor
    rescale: Tensor | None

    def __init__(self, blocks: Tensor, rescale: Tensor | None = None, constraint: float = 0.0) -> None:
        super().__init__(blocks=blocks, rescale=rescale)
        self.constraint = constraint

    @classmethod
    def read(cls, roles: Roles) -> OFT:
        blocks = need(roles, "oft_blocks")
        if "dora_scale" in roles:
            raise ValueError("OFT with DoRA is not supported")
        if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2] or not blocks.numel():
            raise ValueError(f"OFT blocks must be square, got {[*blocks.shape]}")
        rows = blocks.shape[-3] * blocks.shape[-1]
        if blocks.ndim == 4 and (
            blocks.shape[-1] % 2 or rows % (2 ** (blocks.shape[0] - 1) * blocks.shape[-1])
        ):
            raise ValueError(f"BOFT blocks do not make a butterfly, got {[*blocks.shape]}")
        rescale = roles["rescale"].flatten() if "rescale" in roles else None
        if rescale is not None and rescale.shape[0] != rows:
            raise ValueError(f"rescale must have {rows} elements, got {rescale.shape[0]}")
        return cls(blocks, rescale, alpha_of(roles) or 0.0)

    @property
    def butterfly(self) -> bool:
        return self.blocks.ndim == 4

    @property
    def kind(self) -> str:
        return "BOFT" if self.butterfly else "OFT"

    @property
    def shape(self) -> tuple[int, int]:
        return self.blocks.shape[-3] * self.blocks.shape[-1], 0

    def stages(self) -> Tensor:
        """The orthogonal factors [m, k, n, n], float32, that outputs are multiplied by."""
        x = self.blocks.float()
        q = x - x.mT
        if self.constraint > 0:
            q = q * (self.constraint * self.shape[0] / (torch.linalg.vector_norm(q) + 1e-8)).clamp(max=1.0)
        eye = torch.eye(q.shape[-1])
        r = torch.linalg.solve(eye - q, eye + q)  # both factors are functions of Q, so they commute
        return r if self.butterfly else r.mT[None]

    def attached(self, strength: float, weight: Weight) -> Rotated:
        gain = torch.ones(1) if self.rescale is None else self.rescale.float()
        return Rotated(self.stages(), self.butterfly, strength * gain, torch.tensor([strength]))

    def delta(self, weight: Tensor) -> Tensor:
        columns = weight.float().mT
        return self.attached(1.0, lambda: weight)(columns, columns).mT.to(weight.dtype)

    def swapped(self) -> Adapter:
        if self.butterfly:
            raise ValueError("BOFT mixes the halves of its rows")
        return super().swapped()


class Rotated(OutputChange):
    """OFT and BOFT, attached: gain * R W x - strength * W x, with gain [rows] or [1], strength [1]."""

    reads_output = True
    stages: Tensor
    gain: Tensor
    strength: Tensor

    def __init__(self, stages: Tensor, butterfly: bool, gain: Tensor, strength: Tensor) -> None:
        super().__init__(stages=stages, gain=gain, strength=strength)
        self.butterfly = butterfly

    def forward(self, x: Tensor, wx: Tensor | None) -> Tensor:
        wx = cast(Tensor, wx)
        rotated = rotate(wx, self.stages.to(wx.dtype), self.butterfly)
        return self.gain.to(wx.dtype) * rotated - self.strength.to(wx.dtype) * wx


def rotate(y: Tensor, stages: Tensor, butterfly: bool) -> Tensor:
    """R y over the last dim of y [..., rows], each stage [k, n, n] a block-diagonal matrix.

    OFT has one stage. BOFT's stage i joins outputs that lie 2^i n/2 apart (LyCORIS boft.py).
    """
    n = stages.shape[-1]
    for i, blocks in enumerate(stages):
        if not butterfly:
            y = torch.einsum("kij,...kj->...ki", blocks, y.unflatten(-1, (-1, n))).flatten(-2)
            continue
        apart = 2**i * (n // 2)
        groups = y.unflatten(-1, (-1, 2, apart)).transpose(-2, -1).flatten(-3).unflatten(-1, (-1, n))
        joined = torch.einsum("kij,...kj->...ki", blocks, groups).flatten(-2)
        y = joined.unflatten(-1, (-1, apart, 2)).transpose(-2, -1).flatten(-3)
    return y
