"""The parts of the FLUX.1 transformer: embeddings, rotary positions, modulated blocks.

Names are BFL's (black-forest-labs/flux, src/flux/modules/layers.py), so that checkpoints load unmapped. What
differs is the division of labour: a block is given its modulation and its rotary table ready-made, because
neither depends on the image, and so neither belongs in the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..backends.attention import attention
from ..backends.cpu_linear import CPULinear, gelu
from ..quant.linear import compute_dtype, device_of, weight_count
from .spec import FluxSpec

__all__ = [
    "Chunks",
    "DoubleStreamBlock",
    "LastLayer",
    "MLPEmbedder",
    "Modulation",
    "QKNorm",
    "RMSNorm",
    "Rope",
    "SelfAttention",
    "SingleStreamBlock",
    "attention",
    "feed_forward",
    "gated",
    "gated_and_normed",
    "gelu_behind",
    "compute_dtype",
    "device_of",
    "modulated_norm",
    "queries_keys_values",
    "rope_table",
    "rotate",
    "sinusoidal_embedding",
    "weight_count",
]

Chunks = tuple[Tensor, ...]
"""Modulation of one stream in one block, each [B, 1, hidden]: (shift, 1 + scale, gate), once or twice."""

RMS_EPS = 1e-6

Rope = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary angles, each [1, 1, L + N, D/2, 1], float32."""


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


def rope_table(
    ids: Tensor, axes_dim: tuple[int, ...], theta: int, device: torch.device | None = None
) -> Rope:
    """Rotary cosines and sines, float32, for position ids [L + N, 3] (Su et al., arXiv:2104.09864, eq. 34).

    On `device`, or where the ids are. The angles are made once per run, in float64 and so on the CPU: not
    every device has that dtype.
    """
    position, angles = ids.to("cpu", torch.float64), []
    for axis, dim in enumerate(axes_dim):
        frequency = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(position[:, axis, None] * frequency)
    angle = torch.cat(angles, dim=-1)[None, None, :, :, None]
    device = device or ids.device
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """x [B, K, L, D] with each adjacent pair of the head dim turned by its angle; float32 inside."""
    cos, sin = rope
    if torch.compiler.is_compiling() or x.device.type not in ("cpu", "cuda"):
        even, odd = rearrange(x, "b k l (d pair) -> b k l d pair", pair=2).chunk(2, dim=-1)
        turned = torch.cat([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    else:  # one pass instead of seven; compilers cannot fuse complex numbers, and not every device has them
        pairs = torch.view_as_complex(rearrange(x.float(), "b k l (d pair) -> b k l d pair", pair=2))
        turned = torch.view_as_real(pairs * torch.complex(cos, sin).squeeze(-1))
    return rearrange(turned, "b k l d pair -> b k l (d pair)").to(x.dtype)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) * scale + shift, where `scale` already holds FLUX's 1 +.

    One call when the whole batch shares the modulation.
    """
    width = x.shape[-1:]
    if scale.shape[0] == 1:
        return F.layer_norm(x, width, scale.view(-1), shift.view(-1), eps=1e-6)
    return torch.addcmul(shift, F.layer_norm(x, width, eps=1e-6), scale)


def gated(x: Tensor, gate: Tensor, change: Tensor) -> Tensor:
    """The residual stream x [B, L, hidden] with gate * change added."""
    return torch.addcmul(x, gate, change)


def gated_and_normed(
    x: Tensor, gate: Tensor, change: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """`gated`, and its `modulated_norm`."""
    x = gated(x, gate, change)
    return x, modulated_norm(x, shift, scale)


class MLPEmbedder(nn.Module):
    """Two linear layers with SiLU between: how FLUX takes in sigma, guidance and the pooled vector."""

    def __init__(self, in_dim: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden)
        self.out_layer = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the head dim, eps 1e-6, with a learned scale.

    The scale is brought to where x is: a host that is short of memory may have left it behind.
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


def queries_keys_values(
    streams: Sequence[tuple[Tensor, QKNorm]], heads: int, rope: Rope
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed and turned queries and keys, and values, each [B, K, L, D], of streams one after the other.

    A stream is its qkv [B, L, 3 K D] with its norms. On a CPU without gradients q and k of all streams are
    normed and turned together, in float32: half the passes over memory.
    """
    first = streams[0][0]
    wanted = any(qkv.requires_grad for qkv, _ in streams)  # frozen weights: the image's alone
    if torch.compiler.is_compiling() or first.device.type != "cpu" or wanted:
        apart = [rearrange(qkv, "b l (qkv k d) -> qkv b k l d", qkv=3, k=heads) for qkv, _ in streams]
        q = torch.cat([norm.query_norm(x[0]) for x, (_, norm) in zip(apart, streams, strict=True)], dim=2)
        k = torch.cat([norm.key_norm(x[1]) for x, (_, norm) in zip(apart, streams, strict=True)], dim=2)
        return rotate(q, rope), rotate(k, rope), torch.cat([x[2] for x in apart], dim=2)
    qkv = first if len(streams) == 1 else torch.cat([qkv for qkv, _ in streams], dim=1)
    x = qkv.view(*qkv.shape[:2], 3, heads, -1)  # here without einops, which takes as long as the small model
    qk = x[:, :, :2].float()
    ours = qkv is not first or qk.dtype != qkv.dtype  # new memory takes as long as to compute
    turned = _normed_and_turned(qk, streams, rope, ours).to(qkv.dtype)
    return turned[:, :, 0].transpose(1, 2), turned[:, :, 1].transpose(1, 2), x[:, :, 2].transpose(1, 2)


def _normed_and_turned(
    qk: Tensor, streams: Sequence[tuple[Tensor, QKNorm]], rope: Rope, ours: bool
) -> Tensor:
    """Queries and keys [B, L, 2, K, D], float32, after norm and rotation, in place if their memory is `ours`.

    x / sqrt(mean(x^2) + eps) is sqrt(D) x / hypot(|x|, sqrt(D eps)), and sqrt(D) goes with the rotation.
    """
    root = qk.shape[-1] ** 0.5
    length = torch.linalg.vector_norm(qk, dim=-1, keepdim=True)
    qk = torch.div(qk, torch.hypot(length, length.new_tensor(root * RMS_EPS**0.5)), out=qk if ours else None)
    start = 0
    for qkv, norm in streams:
        stop = start + qkv.shape[1]
        scales = torch.stack([norm.query_norm.scale, norm.key_norm.scale]).float()
        qk[:, start:stop].mul_(scales[:, None])
        start = stop
    table = (torch.complex(*rope) * root)[:, 0, :, None, None, :, 0]
    pairs = torch.view_as_complex(qk.view(*qk.shape[:-1], -1, 2))
    return torch.view_as_real(pairs.mul_(table)).flatten(-2)


class SelfAttention(nn.Module):
    """Weights of one stream's attention in a double block: fused qkv, norms, output projection."""

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


def _plainly_on_cpu(x: Tensor) -> bool:
    """Whether nothing follows what is done with x on a CPU: no gradient, no compiler."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _mlp(hidden: int, mlp: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden, mlp), nn.GELU(approximate="tanh"), nn.Linear(mlp, hidden))


def feed_forward(mlp: nn.Sequential, x: Tensor) -> Tensor:
    """What `mlp` gives, its GELU within the first layer where that layer can."""
    first, last = mlp[0], mlp[2]
    if isinstance(first, CPULinear):
        return last(first.gelu(x))
    return last(gelu(first(x))) if _plainly_on_cpu(x) else mlp(x)


def gelu_behind(layer: nn.Module, x: Tensor, plain: int) -> tuple[Tensor, Tensor]:
    """A linear layer's first `plain` outputs as they are, and the rest through GELU."""
    if isinstance(layer, CPULinear) and layer.qkv_dim == plain:
        return layer.split_gelu(x)
    y = layer(x)
    return y[..., :plain], F.gelu(y[..., plain:], approximate="tanh")


class DoubleStreamBlock(nn.Module):
    """Text and image attend to each other with weights of their own (MM-DiT, arXiv:2403.03206)."""

    attention_by: str = "auto"
    """See attention.py; `use_attention` sets it."""

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
        self, img: Tensor, txt: Tensor, img_mod: Chunks, txt_mod: Chunks, rope: Rope
    ) -> tuple[Tensor, Tensor]:
        """img [B, N, hidden] and txt [B, L, hidden] after attention and MLP; text stands before image."""
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = img_mod
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = txt_mod
        img_qkv = self.img_attn.qkv(modulated_norm(img, img_shift1, img_scale1))
        txt_qkv = self.txt_attn.qkv(modulated_norm(txt, txt_shift1, txt_scale1))
        streams = [(txt_qkv, self.txt_attn.norm), (img_qkv, self.img_attn.norm)]
        q, k, v = queries_keys_values(streams, self.img_attn.heads, rope)
        joint = attention(q, k, v, self.attention_by)
        txt_attn, img_attn = joint.split([txt.shape[1], img.shape[1]], dim=1)
        img, inner = gated_and_normed(img, img_gate1, self.img_attn.proj(img_attn), img_shift2, img_scale2)
        img = gated(img, img_gate2, feed_forward(self.img_mlp, inner))
        txt, inner = gated_and_normed(txt, txt_gate1, self.txt_attn.proj(txt_attn), txt_shift2, txt_scale2)
        txt = gated(txt, txt_gate2, feed_forward(self.txt_mlp, inner))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Attention and MLP side by side, one linear layer in and one out (arXiv:2302.05442)."""

    attention_by: str = "auto"
    """See attention.py; `use_attention` sets it."""

    def __init__(self, spec: FluxSpec) -> None:
        super().__init__()
        hidden, self.heads, self.mlp_size = spec.hidden_size, spec.num_heads, spec.mlp_size
        self.linear1 = nn.Linear(hidden, 3 * hidden + self.mlp_size)
        self.linear2 = nn.Linear(hidden + self.mlp_size, hidden)
        self.norm = QKNorm(spec.head_dim)
        self.modulation = Modulation(hidden, 1)

    def forward(self, x: Tensor, mod: Chunks, rope: Rope) -> Tensor:
        """x [B, L + N, hidden] -> the same shape."""
        shift, scale, gate = mod
        inner, plain = modulated_norm(x, shift, scale), 3 * x.shape[-1]
        if _plainly_on_cpu(x) and not isinstance(self.linear1, CPULinear):
            return gated(x, gate, self.linear2(self._joint(self.linear1(inner), plain, rope)))
        qkv, mlp = gelu_behind(self.linear1, inner, plain)
        attn = self._attend(qkv, rope)
        del inner, qkv  # half of what a step holds at its most, if they stayed until linear2 is done
        return gated(x, gate, self.linear2(torch.cat([attn, mlp], dim=-1)))

    def _attend(self, qkv: Tensor, rope: Rope) -> Tensor:
        q, k, v = queries_keys_values([(qkv, self.norm)], self.heads, rope)
        return attention(q, k, v, self.attention_by)

    def _joint(self, y: Tensor, plain: int, rope: Rope) -> Tensor:
        """What `linear2` reads of what `linear1` gave: attention, and GELU of the outputs after `plain`.

        On a CPU the GELU is written straight beside the attention.
        """
        attn = self._attend(y[..., :plain], rope)
        if _plainly_on_cpu(y):
            width = attn.shape[-1]
            joint = y.new_empty(*y.shape[:-1], width + self.mlp_size)
            joint[..., :width].copy_(attn)
            gelu(y[..., plain:], out=joint[..., width:])
            return joint
        return torch.cat([attn, F.gelu(y[..., plain:], approximate="tanh")], dim=-1)


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

    def forward(self, x: Tensor, mod: Chunks) -> Tensor:
        return self.linear(modulated_norm(x, *mod))
