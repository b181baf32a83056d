"""Attention for CPUs on which torch's own is slow: one head and some queries at a time, by oneDNN.

torch's fused attention multiplies float32 by MKL, which leaves AMD's AVX-512 unused
(cpu_linear.mkl_is_slow), and bfloat16 no faster: on one core of an EPYC (Zen 5) it takes 347 ms for 24 heads
of 128 and 1536 tokens in bfloat16, this file 146. Scores and their softmax are float32 in both; then the
weights are rounded to the dtype of the values. The scores of some queries stay in the cache between the two
matmuls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .cpu_info import mkl_is_slow
from .onednn import can_pack

SCORES = 3 << 17
"""Scores that are computed at a time, where they are not those of fewer than QUERIES queries."""

QUERIES = 64
"""Queries that are taken at a time at least: matmuls with fewer rows are slow."""

FEWEST = 384
"""Tokens below which the calls cost more than the matmuls save."""


@functools.cache
def is_quicker(dtype: torch.dtype) -> bool:
    """Whether `attend` is quicker than torch on this CPU in a dtype, from FEWEST tokens on."""
    cpu = torch.device("cpu")
    return (
        dtype in (torch.float32, torch.bfloat16)
        and mkl_is_slow()
        and can_pack(cpu, torch.float32)
        and can_pack(cpu, dtype)
    )


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attend` can take these [B, K, L, D] and is quicker than torch; not for gradients."""
    if q.device.type != "cpu" or torch.is_grad_enabled() or not is_quicker(q.dtype):
        return False
    return min(q.shape[-2], k.shape[-2]) >= FEWEST


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of [B, K, L, D], float32 or bfloat16, heads concatenated: [B, L, K D]."""
    batch, heads, length, dim = q.shape
    joint = q.new_empty(batch, length, heads, dim)
    step = max(QUERIES, SCORES // k.shape[-2])
    for b in range(batch):
        for h in range(heads):
            keys, values = _blocks(k[b, h].float()), _blocks(v[b, h].mT)
            for start in range(0, length, step):
                queries = q[b, h, start : start + step].float() * dim**-0.5
                scores = _matmul(queries, keys)
                weights = torch.softmax(scores, -1, out=scores).to(v.dtype)
                joint[b, start : start + step, h] = _matmul(weights, values)
    return joint.flatten(2)


@functools.cache
def operator() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`attend` as an operator of torch's, which compilers do not look into."""
    op = torch.library.custom_op(
        "rectiflux::attention_on_cpu",
        attend,
        mutates_args=(),
        schema="(Tensor q, Tensor k, Tensor v) -> Tensor",
    )
    op.register_fake(lambda q, k, v: q.new_empty(q.shape[0], q.shape[2], q.shape[1] * q.shape[3]))
    return op


def _blocks(matrix: Tensor) -> Tensor:
    """A matrix [out, in] in oneDNN's memory layout."""
    return torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), None)


def _matmul(x: Tensor, blocks: Tensor) -> Tensor:
    """x [N, in] times the transpose of a matrix [out, in] in that layout."""
    return torch.ops.mkldnn._linear_pointwise(x, blocks, None, "none", [], "")
