"""The arithmetic inside a block as plain functions, and the table through which faster ones take their place.

Every function here is the reference: a few lines of torch, the same on every device (black-forest-labs/flux,
src/flux/math.py and modules/layers.py). `Ops` is a table of them. A model's blocks call the table that
flux_core/backends chooses for the model's device, dtype and installed packages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

if TYPE_CHECKING:
    from .layers import QKNorm

Rope = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary angles, each [1 or B, 1, L + N, D/2, 1], float32."""

Stream = tuple[Tensor, "QKNorm"]
"""A stream's queries, keys and values [B, L, 3 K D] in one tensor, and the norms of its queries and keys."""


def rope_table(
    ids: Tensor, axes_dim: tuple[int, ...], theta: int, device: torch.device | None = None
) -> Rope:
    """Rotary cosines and sines, float32, for position ids [L + N, 3] or [B, L + N, 3].

    On `device`, or where the ids are (Su et al., arXiv:2104.09864, eq. 34). Computed once per run, in float64
    on the CPU, because not every device has that dtype.
    """
    position, angles = ids.to("cpu", torch.float64), []
    for axis, dim in enumerate(axes_dim):
        frequency = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(position[..., axis, None] * frequency)
    angle = torch.cat(angles, dim=-1)
    angle = angle.view(-1, 1, *angle.shape[-2:], 1)
    device = device or ids.device
    return angle.cos().float().to(device), angle.sin().float().to(device)


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """x [B, K, L, D] with each adjacent pair of the head dim rotated by its angle; float32 inside."""
    cos, sin = rope
    even, odd = rearrange(x, "b k l (d pair) -> b k l d pair", pair=2).chunk(2, dim=-1)
    rotated = torch.cat([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rearrange(rotated, "b k l d pair -> b k l (d pair)").to(x.dtype)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) * scale + shift of x [B, L, hidden]; `scale` already contains FLUX's 1 +."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), scale)


def gated_residual(x: Tensor, gate: Tensor, change: Tensor) -> Tensor:
    """The residual stream x [B, L, hidden] with gate * change added."""
    return torch.addcmul(x, gate, change)


def normed_qkv(streams: Sequence[Stream], heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normed queries and keys, and values, each [B, K, L, D], of streams one after the other; no RoPE yet."""
    split = [rearrange(qkv, "b l (qkv k d) -> qkv b k l d", qkv=3, k=heads) for qkv, _ in streams]
    q = torch.cat([norm.query_norm(x[0]) for x, (_, norm) in zip(split, streams, strict=True)], dim=2)
    k = torch.cat([norm.key_norm(x[1]) for x, (_, norm) in zip(split, streams, strict=True)], dim=2)
    return q, k, torch.cat([x[2] for x in split], dim=2)


def rotated_qkv(streams: Sequence[Stream], heads: int, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
    """`normed_qkv` with RoPE applied to queries and keys."""
    q, k, v = normed_qkv(streams, heads)
    return apply_rope(q, rope), apply_rope(k, rope), v


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v over [B, K, L, D], heads concatenated: [B, L, K D].

    `bias` is additive (or boolean, True where a key is attended) and broadcasts to [B, K, L, L].
    """
    joint = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return rearrange(joint, "b k l d -> b l (k d)")


def gelu_linear(linear: nn.Module, x: Tensor) -> Tensor:
    """GELU (tanh approximation) of a linear layer's outputs."""
    return F.gelu(linear(x), approximate="tanh")


def qkv_and_gelu(linear: nn.Module, x: Tensor, qkv_dim: int) -> tuple[Tensor, Tensor]:
    """A single block's `linear1`: its first `qkv_dim` outputs unchanged, and GELU of the rest."""
    y = linear(x)
    return y[..., :qkv_dim], F.gelu(y[..., qkv_dim:], approximate="tanh")


@dataclass(frozen=True)
class Ops:
    """The functions a block calls; each has the signature of the reference above that is its default."""

    modulated_norm: Callable[[Tensor, Tensor, Tensor], Tensor] = modulated_norm
    rotated_qkv: Callable[[Sequence[Stream], int, Rope], tuple[Tensor, Tensor, Tensor]] = rotated_qkv
    attention: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] = attention
    gelu_linear: Callable[[nn.Module, Tensor], Tensor] = gelu_linear
    qkv_and_gelu: Callable[[nn.Module, Tensor, int], tuple[Tensor, Tensor]] = qkv_and_gelu


REFERENCE = Ops()
"""The functions of this file: differentiable, and the same on every device."""
