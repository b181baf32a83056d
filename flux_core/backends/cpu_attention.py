"""Attention for processors on which torch's own is slow: a head and some queries at a time, by oneDNN.

torch's fused attention multiplies float32 by MKL, which leaves AMD's AVX-512 unused (packed.mkl_is_slow), and
bfloat16 no faster: on one core of an EPYC (Zen 5) it takes 347 ms for 24 heads of 128 and 1536 tokens in
bfloat16, what is here 146. Scores and their softmax are float32 in both; then the weights are rounded to the
dtype of the values. Scores of some queries stay in the cache from one product to the next.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cpu_linear import can_pack, mkl_is_slow

SCORES = 3 << 17
"""Scores that are worked on at a time, where they are not those of fewer than QUERIES queries."""

QUERIES = 64
"""Queries that are worked on at a time at least: products with fewer rows are slow."""

FEWEST = 384
"""Tokens below which calling costs more than the products save."""


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attend` is quicker than torch for these [B, K, L, D]; not where a gradient is wanted."""
    if q.device.type != "cpu" or q.dtype not in (torch.float32, torch.bfloat16):
        return False
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return not wanted and min(q.shape[-2], k.shape[-2]) >= FEWEST and _is_quicker(q.dtype)


@torch.compiler.assume_constant_result
def _is_quicker(dtype: torch.dtype) -> bool:
    cpu = torch.device("cpu")
    return mkl_is_slow() and can_pack(cpu, torch.float32) and can_pack(cpu, dtype)


@torch.library.custom_op("rectiflux::attention_on_cpu", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of [B, K, L, D], float32 or bfloat16, heads joined: [B, L, K D]."""
    batch, heads, length, dim = q.shape
    joint = q.new_empty(batch, length, heads, dim)
    step = max(QUERIES, SCORES // k.shape[-2])
    for b in range(batch):
        for h in range(heads):
            keys, values = _blocks(k[b, h].float()), _blocks(v[b, h].mT)
            for start in range(0, length, step):
                queries = q[b, h, start : start + step].float() * dim**-0.5
                scores = _product(queries, keys)
                weights = torch.softmax(scores, -1, out=scores).to(v.dtype)
                joint[b, start : start + step, h] = _product(weights, values)
    return joint.flatten(2)


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, dim = q.shape
    return q.new_empty(batch, length, heads * dim)


def _blocks(matrix: Tensor) -> Tensor:
    """A matrix [out, in] in oneDNN's order."""
    return torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), None)


def _product(x: Tensor, blocks: Tensor) -> Tensor:
    """x [N, in] times the transpose of a matrix [out, in] in that order."""
    return torch.ops.mkldnn._linear_pointwise(x, blocks, None, "none", [], "")
