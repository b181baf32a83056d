"""Shapes, strides and grids of the kernels: from tensors to launches.

The last dim of every tensor is contiguous, the others may have any strides. A modulation [B or 1, 1, hidden]
that the whole batch shares has a stride of 0 there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import kernels as _kernels

kernels: Any = _kernels  # functions that are launched by kernel[grid](...), which their types do not say

STRETCH = 1024
"""Numbers of a row that a program of `beside_gelu` takes."""
HEADS = 8
"""Heads of a token that a program takes at most."""

Stream = tuple[Tensor, Tensor, Tensor]
"""qkv [B, L, 3 K D], and the scales of the norms of queries and of keys [D]."""


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) * scale + shift for x [B, L, hidden]."""
    batch, length, width = x.shape
    out = x.new_empty(x.shape)
    block = _power(width)
    kernels.modulated_norm[(batch * length,)](
        x,
        shift,
        scale,
        out,
        length,
        *x.stride()[:2],
        _of_batch(shift),
        _of_batch(scale),
        width,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return out


def gated_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate * y for x and y [B, L, hidden]."""
    return _gated(x, gate, y, None)[0]


def residual_and_norm(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """x + gate * y, and its LayerNorm * scale + shift."""
    return _gated(x, gate, y, (shift, scale))


def _gated(
    x: Tensor, gate: Tensor, y: Tensor, modulation: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    batch, length, width = x.shape
    out = x.new_empty(x.shape)
    normed = out if modulation is None else x.new_empty(x.shape)
    shift, scale = (gate, gate) if modulation is None else modulation
    block = _power(width)
    kernels.gated_residual[(batch * length,)](
        x,
        gate,
        y,
        shift,
        scale,
        out,
        normed,
        length,
        *x.stride()[:2],
        *y.stride()[:2],
        _of_batch(gate),
        _of_batch(shift),
        _of_batch(scale),
        width,
        BLOCK=block,
        NORM=modulation is not None,
        num_warps=_warps(block),
    )
    return out, normed


def queries_keys_values(
    streams: Sequence[Stream], heads: int, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed and turned queries and keys, and values, each [B, K, L, D], of one stream or of two.

    In memory the heads stand behind the tokens, as attention reads and writes them. The values of one stream
    are a view of its qkv. The tables are those of layers.Rope.
    """
    (first, *scales), (second, *others) = streams[0], streams[-1]
    batch, length, width = first.shape
    dim = width // 3 // heads
    total = sum(qkv.shape[1] for qkv, *_ in streams)
    q, k = first.new_empty(2, batch, total, heads, dim)
    two = len(streams) == 2
    v = torch.empty_like(q) if two else first[..., 2 * heads * dim :].unflatten(-1, (heads, dim))
    block, row = min(HEADS, _power(heads)), _power(dim)
    kernels.queries_keys_values[(total, batch, -(-heads // block))](
        first,
        second,
        *scales,
        *others,
        cos,
        sin,
        q,
        k,
        v,
        length,
        *first.stride()[:2],
        *second.stride()[:2],
        heads,
        dim,
        HEADS=block,
        DIM=row,
        VALUES=two,
        num_warps=max(1, block * row // 256),
    )
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def beside_gelu(attn: Tensor, y: Tensor, plain: int) -> Tensor:
    """attn [B, L, C] with GELU (tanh) of y[..., plain:] beside it, [B, L, C + M]."""
    batch, length, attn_width = attn.shape
    width = attn_width + y.shape[-1] - plain
    out = attn.new_empty(batch, length, width)
    kernels.beside_gelu[(batch * length, -(-width // STRETCH))](
        attn,
        y,
        out,
        length,
        *attn.stride()[:2],
        *y.stride()[:2],
        attn_width,
        plain,
        width,
        BLOCK=STRETCH,
        num_warps=4,
    )
    return out


def rows_in_fp8(x: Tensor, largest: float, smallest: float) -> tuple[Tensor, Tensor]:
    """Codes [N, C], float8_e4m3fn, and scales [N, 1] of x [N, C]; `largest` is the largest code."""
    count, width = x.shape
    codes = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    scales = x.new_empty(count, 1, dtype=torch.float32)
    block = _power(width)
    kernels.rows_in_fp8[(count,)](
        x,
        codes,
        scales,
        x.stride(0),
        width,
        largest=largest,
        smallest=smallest,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return codes, scales


def _of_batch(modulation: Tensor) -> int:
    """How far apart two pictures' modulations lie."""
    return 0 if modulation.shape[0] == 1 else modulation.stride(0)


def _power(count: int) -> int:
    """The least power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()


def _warps(block: int) -> int:
    """Warps for a row of so many numbers: some 16 numbers a thread."""
    return min(8, max(1, block // 512))
