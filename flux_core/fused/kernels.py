"""The Triton kernels themselves: what they compute, row by row, in float32 whatever goes in and out.

Imported when a kernel is first launched (launch.py, which also says which shapes and strides they take).
Rows are counted in 64 bits, because a large batch of long rows has more numbers than 32 bits count. A mask
keeps what lies beyond a row, whose length need not be a power of two, out of sums and of the results.
"""

# Without `from __future__ import annotations`: Triton reads them as they are.
# pyright: reportMissingImports=false

import triton
import triton.language as tl

EPS = tl.constexpr(1e-6)
"""Of the layer norm and of the root-mean-square norm, as in layers.py."""


@triton.jit
def _normed(values, inside, width):
    """A row's values with mean 0 and variance 1."""
    centred = tl.where(inside, values - tl.sum(values, 0) / width, 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, 0) / width + EPS)


@triton.jit
def modulated_norm(
    x, shift, scale, out, length, x_batch, x_row, shift_batch, scale_batch, width, BLOCK: tl.constexpr
):
    """out[b, l] = norm(x[b, l]) * scale[b] + shift[b]; a program is a row."""
    row = tl.program_id(0).to(tl.int64)
    batch, position = row // length, row % length
    column = tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(x + batch * x_batch + position * x_row + column, inside, 0.0).to(tl.float32)
    factor = tl.load(scale + batch * scale_batch + column, inside, 0.0).to(tl.float32)
    offset = tl.load(shift + batch * shift_batch + column, inside, 0.0).to(tl.float32)
    result = _normed(values, inside, width) * factor + offset
    tl.store(out + row * width + column, result.to(out.dtype.element_ty), inside)


@triton.jit
def gated_residual(
    x,
    gate,
    y,
    shift,
    scale,
    out,
    normed,
    length,
    x_batch,
    x_row,
    y_batch,
    y_row,
    gate_batch,
    shift_batch,
    scale_batch,
    width,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
):
    """out[b, l] = x[b, l] + gate[b] * y[b, l]; with NORM also its modulated norm. A program is a row."""
    row = tl.program_id(0).to(tl.int64)
    batch, position = row // length, row % length
    column = tl.arange(0, BLOCK)
    inside = column < width
    before = tl.load(x + batch * x_batch + position * x_row + column, inside, 0.0).to(tl.float32)
    change = tl.load(y + batch * y_batch + position * y_row + column, inside, 0.0).to(tl.float32)
    open_by = tl.load(gate + batch * gate_batch + column, inside, 0.0).to(tl.float32)
    after = (before + open_by * change).to(out.dtype.element_ty)
    tl.store(out + row * width + column, after, inside)
    if NORM:  # of what was stored, so that it is the norm of what goes on
        factor = tl.load(scale + batch * scale_batch + column, inside, 0.0).to(tl.float32)
        offset = tl.load(shift + batch * shift_batch + column, inside, 0.0).to(tl.float32)
        result = _normed(after.to(tl.float32), inside, width) * factor + offset
        tl.store(normed + row * width + column, result.to(normed.dtype.element_ty), inside)


@triton.jit
def _turned(
    source, norm, cos, sin, place, column, inside, dim: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr
):
    """Heads of one token after the norm and the rotation of adjacent pairs [HEADS, DIM], float32."""
    x = tl.load(source + place, inside, 0.0).to(tl.float32)
    scale = tl.load(norm + column, column < dim, 0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 1) / dim + EPS)[:, None] * scale[None, :]
    even, odd = tl.split(tl.reshape(x, (HEADS, DIM // 2, 2)))
    return tl.interleave(even * cos - odd * sin, even * sin + odd * cos)


@triton.jit
def queries_keys_values(
    first,
    second,
    first_query,
    first_key,
    second_query,
    second_key,
    cos,
    sin,
    q,
    k,
    v,
    first_length,
    first_batch,
    first_row,
    second_batch,
    second_row,
    heads,
    dim: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    VALUES: tl.constexpr,
):
    """q and k (with VALUES v, too) [b, l, heads, dim] of a token; a program is HEADS heads of one token.

    A token is one of `first`, the rest are those of `second`; each is laid out (q, k, v) (heads, dim).
    """
    token, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if token < first_length:
        source = first + batch * first_batch + token.to(tl.int64) * first_row
        query, key = first_query, first_key
    else:
        source = second + batch * second_batch + (token - first_length).to(tl.int64) * second_row
        query, key = second_query, second_key
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, DIM)
    place = head[:, None] * dim + column[None, :]
    inside = (head < heads)[:, None] & (column < dim)[None, :]
    pair = tl.arange(0, DIM // 2)
    there = pair < dim // 2
    c = tl.load(cos + token * (dim // 2) + pair, there, 0.0)[None, :]
    s = tl.load(sin + token * (dim // 2) + pair, there, 0.0)[None, :]
    width = heads * dim
    target = (batch * tl.num_programs(0) + token) * width + place
    turned = _turned(source, query, c, s, place, column, inside, dim, HEADS, DIM)
    tl.store(q + target, turned.to(q.dtype.element_ty), inside)
    turned = _turned(source + width, key, c, s, place, column, inside, dim, HEADS, DIM)
    tl.store(k + target, turned.to(k.dtype.element_ty), inside)
    if VALUES:
        tl.store(v + target, tl.load(source + 2 * width + place, inside, 0.0), inside)


@triton.jit
def beside_gelu(
    attn,
    y,
    out,
    length,
    attn_batch,
    attn_row,
    y_batch,
    y_row,
    attn_width,
    plain,
    width,
    BLOCK: tl.constexpr,
):
    """out[b, l] = (attn[b, l], gelu(y[b, l, plain:])); a program is a stretch of a row.

    GELU (tanh) as x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)): the same function.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, position = row // length, row % length
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_attn = column < attn_width
    is_mlp = (column >= attn_width) & (column < width)
    joint = tl.load(attn + batch * attn_batch + position * attn_row + column, is_attn, 0.0)
    inner = y + batch * y_batch + position * y_row + plain - attn_width
    x = tl.load(inner + column, is_mlp, 0.0).to(tl.float32)
    gelu = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    result = tl.where(is_attn, joint, gelu.to(out.dtype.element_ty))
    tl.store(out + row * width + column, result, column < width)


@triton.jit
def rows_in_fp8(
    x, codes, scales, x_row, width, largest: tl.constexpr, smallest: tl.constexpr, BLOCK: tl.constexpr
):
    """scales[n] = max |x[n]| / largest, codes[n] = x[n] / scales[n]; a program is a row.

    Both divisions are rounded as torch rounds them: an ulp less could be another code.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(x + row * x_row + column, inside, 0.0).to(tl.float32)
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(values), 0), smallest), largest)
    tl.store(scales + row, scale)
    tl.store(codes + row * width + column, tl.div_rn(values, scale).to(codes.dtype.element_ty), inside)
