"""Dequantizes GGUF's blocks to float32, one function per type, vectorized in torch on any device.

The layouts are those of ggml (ggml-common.h) as the `gguf` package reads them (gguf/quants.py), and each
function returns exactly the values of `gguf.quants.dequantize`. A block is `size` elements in `bytes` bytes;
a row of a weight is a whole number of blocks. In the layouts below, `d` is a float16 scale, and from codes
"around 8" 8 is subtracted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

K = 256
"""Elements in a block of the K types."""

CODEBOOK = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The 16 levels of IQ4_NL and IQ4_XS."""


@dataclass(frozen=True)
class BlockType:
    """A GGUF type: elements and bytes in a block, and a function [n, bytes] uint8 -> [n, size] float32."""

    size: int
    bytes: int
    unpack: Callable[[Tensor], Tensor]


def dequantize(packed: Tensor, kind: str) -> Tensor:
    """Values [..., N], float32, of packed blocks [..., N / size * bytes], uint8, of the GGUF type `kind`.

    Raises KeyError for a type that is not in BLOCK_TYPES.
    """
    block = BLOCK_TYPES[kind]
    values = block.unpack(packed.reshape(-1, block.bytes))
    return values.reshape(*packed.shape[:-1], packed.shape[-1] // block.bytes * block.size)


def _fields(packed: Tensor, bits: int, run: int) -> Tensor:
    """Unsigned fields [n, m * 8 / bits] of bytes [n, m], lowest bits first.

    The fields at one bit position of `run` adjacent bytes come first, then those at the next position.
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    spread = packed.reshape(packed.shape[0], -1, 1, run) >> shifts[:, None]
    return (spread & (2**bits - 1)).reshape(packed.shape[0], -1)


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of every block, as float32 [n, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _float32(blocks: Tensor) -> Tensor:
    return blocks.contiguous().view(torch.float32)


def _float16(blocks: Tensor) -> Tensor:
    return blocks.contiguous().view(torch.float16).float()


def _bfloat16(blocks: Tensor) -> Tensor:
    return blocks.contiguous().view(torch.bfloat16).float()


def _q8_0(blocks: Tensor) -> Tensor:
    """d, then 32 signed bytes."""
    return _half(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def _q4_0(blocks: Tensor) -> Tensor:
    """d, then 32 nibbles around 8."""
    return _half(blocks, 0) * (_fields(blocks[:, 2:], 4, 16).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    """d and the minimum, then 32 nibbles."""
    return _half(blocks, 0) * _fields(blocks[:, 4:], 4, 16).float() + _half(blocks, 2)


def _five_bits(high: Tensor, low: Tensor) -> Tensor:
    """5-bit codes [n, 32], float32: fifth bits in 4 bytes, low nibbles in 16 bytes."""
    return (_fields(low, 4, 16) | (_fields(high, 1, 1) << 4)).float()


def _q5_0(blocks: Tensor) -> Tensor:
    """d, 32 fifth bits, then 32 nibbles; around 16."""
    return _half(blocks, 0) * (_five_bits(blocks[:, 2:6], blocks[:, 6:]) - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    """d and the minimum, 32 fifth bits, then 32 nibbles."""
    return _half(blocks, 0) * _five_bits(blocks[:, 4:8], blocks[:, 8:]) + _half(blocks, 2)


def _q2_k(blocks: Tensor) -> Tensor:
    """16 nibble pairs (scale, minimum), 256 2-bit codes, d and dmin."""
    scales, packed = blocks[:, :16], blocks[:, 16:80]
    scale = (_half(blocks, 80) * (scales & 15).float())[..., None]
    minimum = (_half(blocks, 82) * (scales >> 4).float())[..., None]
    codes = _fields(packed, 2, 32).reshape(-1, 16, 16).float()
    return (scale * codes - minimum).reshape(-1, K)


def _q3_k(blocks: Tensor) -> Tensor:
    """256 high bits, 256 low bit pairs, 16 scales of six bits around 32, d; codes around 4."""
    high, low, scales = blocks[:, :32], blocks[:, 32:96], blocks[:, 96:108]
    six = _fields(scales[:, :8], 4, 8) | (_fields(scales[:, 8:], 2, 4) << 4)
    scale = (_half(blocks, 108) * (six.float() - 32))[..., None]
    codes = (_fields(low, 2, 32) + (_fields(high, 1, 32) << 2)).float() - 4
    return (scale * codes.reshape(-1, 16, 16)).reshape(-1, K)


def _scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """8 scales and 8 minima of six bits, each [n, 8] float32, of the 12 bytes that Q4_K and Q5_K have.

    The first four of each are the low bits of bytes 0-3 and 4-7; the last four have their low nibbles in
    bytes 8-11 and their high bit pairs in the top bits of the first eight bytes.
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat([first & 63, (third & 15) | ((first >> 2) & 48)], dim=-1)
    minima = torch.cat([second & 63, (third >> 4) | ((second >> 2) & 48)], dim=-1)
    return scales.float(), minima.float()


def _with_minima(blocks: Tensor, codes: Tensor) -> Tensor:
    """Codes [n, 256] in eight groups, scaled and shifted by their block's header (d, dmin, 12 bytes)."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    scale = (_half(blocks, 0) * scales)[..., None]
    minimum = (_half(blocks, 2) * minima)[..., None]
    return (scale * codes.reshape(-1, 8, 32).float() - minimum).reshape(-1, K)


def _q4_k(blocks: Tensor) -> Tensor:
    """The header, then 256 nibbles."""
    return _with_minima(blocks, _fields(blocks[:, 16:], 4, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    """The header, 256 fifth bits, then 256 nibbles."""
    return _with_minima(blocks, _fields(blocks[:, 48:], 4, 32) | (_fields(blocks[:, 16:48], 1, 32) << 4))


def _q6_k(blocks: Tensor) -> Tensor:
    """256 nibbles, 256 high bit pairs, 16 signed scales, d; around 32."""
    low, high, scales = blocks[:, :128], blocks[:, 128:192], blocks[:, 192:208]
    scale = (_half(blocks, 208) * scales.view(torch.int8).float())[..., None]
    codes = (_fields(low, 4, 64) | (_fields(high, 2, 32) << 4)).float() - 32
    return (scale * codes.reshape(-1, 16, 16)).reshape(-1, K)


def _levels(codes: Tensor) -> Tensor:
    """The codebook's levels, float32, at codes 0..15."""
    return torch.tensor(CODEBOOK, dtype=torch.float32, device=codes.device)[codes.int()]


def _iq4_nl(blocks: Tensor) -> Tensor:
    """d, then 32 nibbles that index levels."""
    return _half(blocks, 0) * _levels(_fields(blocks[:, 2:], 4, 16))


def _iq4_xs(blocks: Tensor) -> Tensor:
    """d, 8 scales of six bits around 32 (high bit pairs, nibbles), then 256 nibbles that index levels."""
    six = _fields(blocks[:, 4:8], 4, 1) | (_fields(blocks[:, 2:4], 2, 1) << 4)
    scale = (_half(blocks, 0) * (six.float() - 32))[..., None]
    return (scale * _levels(_fields(blocks[:, 8:], 4, 16)).reshape(-1, 8, 32)).reshape(-1, K)


BLOCK_TYPES: dict[str, BlockType] = {
    "F32": BlockType(1, 4, _float32),
    "F16": BlockType(1, 2, _float16),
    "BF16": BlockType(1, 2, _bfloat16),
    "Q8_0": BlockType(32, 34, _q8_0),
    "Q5_1": BlockType(32, 24, _q5_1),
    "Q5_0": BlockType(32, 22, _q5_0),
    "Q4_1": BlockType(32, 20, _q4_1),
    "Q4_0": BlockType(32, 18, _q4_0),
    "Q6_K": BlockType(K, 210, _q6_k),
    "Q5_K": BlockType(K, 176, _q5_k),
    "Q4_K": BlockType(K, 144, _q4_k),
    "Q3_K": BlockType(K, 110, _q3_k),
    "Q2_K": BlockType(K, 84, _q2_k),
    "IQ4_NL": BlockType(32, 18, _iq4_nl),
    "IQ4_XS": BlockType(K, 136, _iq4_xs),
}
"""The supported types by their names in ggml."""
