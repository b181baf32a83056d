"""Operations of a block for eager torch without gradients: fewer passes over memory than the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..model.layers import RMS_EPS
from ..model.ops import REFERENCE, Rope, Stream, normed_qkv
from .cpu_gelu import gelu
from .cpu_linear import CPULinear


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """As the reference; one call when the whole batch shares the modulation."""
    if scale.numel() == x.shape[-1]:
        return F.layer_norm(x, x.shape[-1:], scale.view(-1), shift.view(-1), eps=1e-6)
    return REFERENCE.modulated_norm(x, shift, scale)


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """RoPE by complex multiplication: one pass where the reference takes seven."""
    pairs = torch.view_as_complex(rearrange(x.float(), "b k l (d pair) -> b k l d pair", pair=2))
    rotated = torch.view_as_real(pairs * torch.complex(*rope).squeeze(-1))
    return rotated.flatten(-2).to(x.dtype)


def rotated_qkv(streams: Sequence[Stream], heads: int, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference, with `apply_rope` above."""
    q, k, v = normed_qkv(streams, heads)
    return apply_rope(q, rope), apply_rope(k, rope), v


def rotated_qkv_on_cpu(streams: Sequence[Stream], heads: int, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference, queries and keys of all streams normed and rotated together in float32, in place.

    x / sqrt(mean(x^2) + eps) is sqrt(D) x / hypot(|x|, sqrt(D eps)); the factor sqrt(D) goes into the table.
    """
    first = streams[0][0]
    qkv = first if len(streams) == 1 else torch.cat([qkv for qkv, _ in streams], dim=1)
    x = qkv.view(*qkv.shape[:2], 3, heads, -1)
    qk, root = x[:, :, :2].float(), x.shape[-1] ** 0.5
    in_place = qkv is not first or qk.dtype != qkv.dtype  # else it is the layer's own output, and a view
    length = torch.linalg.vector_norm(qk, dim=-1, keepdim=True)
    length = torch.hypot(length, length.new_tensor(root * RMS_EPS**0.5))
    qk = torch.div(qk, length, out=qk if in_place else None)
    start = 0
    for stream, norm in streams:
        stop = start + stream.shape[1]
        scales = torch.stack([norm.query_norm.scale, norm.key_norm.scale]).float()
        qk[:, start:stop].mul_(scales[:, None])
        start = stop
    rotation = (torch.complex(*rope) * root)[:, 0, :, None, None, :, 0]
    pairs = torch.view_as_complex(qk.view(*qk.shape[:-1], -1, 2))
    qk = torch.view_as_real(pairs.mul_(rotation)).flatten(-2).to(qkv.dtype)
    return qk[:, :, 0].transpose(1, 2), qk[:, :, 1].transpose(1, 2), x[:, :, 2].transpose(1, 2)


def gelu_within(linear: nn.Module, x: Tensor) -> Tensor:
    """As the reference, the GELU within a packed layer's matmul."""
    return linear.gelu(x) if isinstance(linear, CPULinear) else REFERENCE.gelu_linear(linear, x)


def qkv_and_gelu_within(linear: nn.Module, x: Tensor, qkv_dim: int) -> tuple[Tensor, Tensor]:
    """As the reference, the GELU within a packed layer's matmul."""
    if isinstance(linear, CPULinear) and linear.qkv_dim == qkv_dim:
        return linear.split_gelu(x)
    return REFERENCE.qkv_and_gelu(linear, x, qkv_dim)


def gelu_linear(linear: nn.Module, x: Tensor) -> Tensor:
    """As the reference, by the GELU that is quickest on this CPU."""
    return linear.gelu(x) if isinstance(linear, CPULinear) else gelu(linear(x))


def qkv_and_gelu(linear: nn.Module, x: Tensor, qkv_dim: int) -> tuple[Tensor, Tensor]:
    """As the reference, by the GELU that is quickest on this CPU."""
    if isinstance(linear, CPULinear) and linear.qkv_dim == qkv_dim:
        return linear.split_gelu(x)
    y = linear(x)
    return y[..., :qkv_dim], gelu(y[..., qkv_dim:])


COMPILED = replace(REFERENCE, gelu_linear=gelu_within, qkv_and_gelu=qkv_and_gelu_within)
GPU = replace(REFERENCE, modulated_norm=modulated_norm, rotated_qkv=rotated_qkv)
CPU = replace(
    REFERENCE,
    modulated_norm=modulated_norm,
    rotated_qkv=rotated_qkv_on_cpu,
    gelu_linear=gelu_linear,
    qkv_and_gelu=qkv_and_gelu,
)
