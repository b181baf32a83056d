"""The parts of the FLUX.1 transformer: embeddings, norms, modulated blocks, in plain torch.

Names are BFL's (black-forest-labs/flux, src/flux/modules/layers.py), so that checkpoints load unmapped. One
thing differs: a block receives its modulation and its rotary table ready-made, because neither depends on the
image, and both are computed once per run. The arithmetic between the layers is in ops.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import REFERENCE, Ops, Rope, gated_residual
from .spec import FluxSpec

if TYPE_CHECKING:
    from .hooks import AttentionAt

Chunks = tuple[Tensor, ...]
"""Modulation of one stream in one block, once or twice (shift, 1 + scale, gate), each [B, 1 or L, hidden]."""

RMS_EPS = 1e-6


@dataclass(frozen=True)
class Shared:
    """What all blocks of one evaluation share.

    `bias` is added to the attention scores of the joint sequence [B or 1, K or 1, L + N, L + N]; `hooks` are
    those on attention, bound to the block that is called.
    """

    rope: Rope
    ops: Ops = REFERENCE
    bias: Tensor | None = None
    hooks: AttentionAt | None = None


def sinusoidal_embedding(value: Tensor, dim: int = 256, max_period: float = 10_000.0) -> Tensor:
    """Embedding [B, dim], float32, cosines then sines, of values in 0..1 (a sigma) or of guidance scales.

    The factor of 1000 is FLUX's (BFL layers.py timestep_embedding). BFL rounds the value to the model's dtype
    first; here it stays float32, which in bfloat16 saves an error of up to 3.5 in 1000.
    """
    half = dim // 2
    frequency = torch.exp(
        -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=value.device) / half
    )
    angle = 1000.0 * value.float()[:, None] * frequency[None]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class MLPEmbedder(nn.Module):
    """Two linear layers with SiLU between: how FLUX takes in sigma, guidance and the pooled vector."""

    def __init__(self, in_dim: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden)
        self.out_layer = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the head dim with a learned scale.

    The scale is moved to where x is: a host that is short of memory may have offloaded it.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale.to(x.device, x.dtype), eps=RMS_EPS)


class QKNorm(nn.Module):
    """The norms of queries and keys."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)


class SelfAttention(nn.Module):
    """Weights of one stream's attention in a double block: qkv in one layer, norms, output projection."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.norm = QKNorm(hidden // heads)
        self.proj = nn.Linear(hidden, hidden)


class Modulation(nn.Module):
    """A block's shifts, scales and gates from the conditioning vector (adaLN-zero, arXiv:2212.09748)."""

    def __init__(self, hidden: int, parts: int) -> None:
        super().__init__()
        self.lin = nn.Linear(hidden, 3 * parts * hidden)

    def forward(self, vec: Tensor) -> Chunks:
        """(shift, 1 + scale, gate) per part, each [B, 1, hidden], from vec [B, hidden]."""
        chunks = self.lin(F.silu(vec))[:, None].chunk(self.lin.out_features // vec.shape[-1], dim=-1)
        return tuple(c + 1 if i % 3 == 1 else c for i, c in enumerate(chunks))


def attend(streams: list[tuple[Tensor, QKNorm]], heads: int, shared: Shared) -> Tensor:
    """Joint attention [B, L, K D] over streams, one after the other: (qkv [B, L, 3 K D], norms) each."""
    if shared.hooks is not None:
        return shared.hooks.attend(streams, heads, shared)
    q, k, v = shared.ops.rotated_qkv(streams, heads, shared.rope)
    return shared.ops.attention(q, k, v, shared.bias)


class DoubleStreamBlock(nn.Module):
    """Text and image attend to each other with weights of their own (MM-DiT, arXiv:2403.03206)."""

    def __init__(self, spec: FluxSpec) -> None:
        super().__init__()
        hidden = spec.hidden_size
        self.img_mod = Modulation(hidden, 2)
        self.img_attn = SelfAttention(hidden, spec.num_heads)
        self.img_mlp = _mlp(hidden, spec.mlp_size)
        self.txt_mod = Modulation(hidden, 2)
        self.txt_attn = SelfAttention(hidden, spec.num_heads)
        self.txt_mlp = _mlp(hidden, spec.mlp_size)

    def forward(
        self, img: Tensor, txt: Tensor, img_mod: Chunks, txt_mod: Chunks, shared: Shared
    ) -> tuple[Tensor, Tensor]:
        """img [B, N, hidden] and txt [B, L, hidden] after attention and MLP; text comes before image."""
        ops = shared.ops
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = img_mod
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = txt_mod
        img_qkv = self.img_attn.qkv(ops.modulated_norm(img, img_shift1, img_scale1))
        txt_qkv = self.txt_attn.qkv(ops.modulated_norm(txt, txt_shift1, txt_scale1))
        streams = [(txt_qkv, self.txt_attn.norm), (img_qkv, self.img_attn.norm)]
        joint = attend(streams, self.img_attn.heads, shared)
        txt_attn, img_attn = joint.split([txt.shape[1], img.shape[1]], dim=1)

        img = gated_residual(img, img_gate1, self.img_attn.proj(img_attn))
        inner = ops.gelu_linear(self.img_mlp[0], ops.modulated_norm(img, img_shift2, img_scale2))
        img = gated_residual(img, img_gate2, self.img_mlp[2](inner))

        txt = gated_residual(txt, txt_gate1, self.txt_attn.proj(txt_attn))
        inner = ops.gelu_linear(self.txt_mlp[0], ops.modulated_norm(txt, txt_shift2, txt_scale2))
        txt = gated_residual(txt, txt_gate2, self.txt_mlp[2](inner))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Attention and MLP side by side, one linear layer in and one out (arXiv:2302.05442)."""

    def __init__(self, spec: FluxSpec) -> None:
        super().__init__()
        hidden, self.heads = spec.hidden_size, spec.num_heads
        self.linear1 = nn.Linear(hidden, 3 * hidden + spec.mlp_size)
        self.linear2 = nn.Linear(hidden + spec.mlp_size, hidden)
        self.norm = QKNorm(spec.head_dim)
        self.modulation = Modulation(hidden, 1)

    def forward(self, x: Tensor, mod: Chunks, shared: Shared) -> Tensor:
        """x [B, L + N, hidden] -> the same shape."""
        shift, scale, gate = mod
        inner = shared.ops.modulated_norm(x, shift, scale)
        qkv, mlp = shared.ops.qkv_and_gelu(self.linear1, inner, 3 * x.shape[-1])
        attn = attend([(qkv, self.norm)], self.heads, shared)
        del inner, qkv  # half of a step's peak memory, if they lived until linear2 has run
        return gated_residual(x, gate, self.linear2(torch.cat([attn, mlp], dim=-1)))


class LastLayer(nn.Module):
    """Final modulated norm and linear map to the velocity of each token."""

    def __init__(self, hidden: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def modulate(self, vec: Tensor) -> Chunks:
        """(shift, 1 + scale), each [B, 1, hidden]."""
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return shift, scale + 1

    def forward(self, x: Tensor, mod: Chunks, ops: Ops = REFERENCE) -> Tensor:
        return self.linear(ops.modulated_norm(x, *mod))


def _mlp(hidden: int, mlp: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden, mlp), nn.GELU(approximate="tanh"), nn.Linear(mlp, hidden))
