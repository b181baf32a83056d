"""Linear layers that multiply in int8 on a CPU, through oneDNN: faster than float32, and less exact."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant.formats import QuantizedWeight
from ..quant.linear import QuantizedLinear
from .cpu_gelu import gelu_in_float32, row_slices
from .cpu_linear import CPULinear
from .onednn import PackedWeight, can_pack, packed_operator

LARGEST = 127
"""The largest code: codes are symmetric, -127 to 127."""

LARGEST_WITHOUT_VNNI = 64
"""The largest code of a weight on CPUs that add two int8 products in 16 bits, which larger codes overflow."""


class Int8Weight(QuantizedWeight):
    """int8 codes [out, in] times a float32 scale for each row [out], packed for oneDNN where possible."""

    scale: Tensor
    unpacked: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        packable = can_pack(codes.device, torch.int8)
        super().__init__(unpacked=None if packable else codes, scale=scale)
        self._shape = codes.shape
        self.packed = PackedWeight(torch.ops.onednn.qlinear_prepack(codes, None)) if packable else None
        self.zero_points = torch.zeros(len(codes), dtype=torch.int32)

    @property
    def shape(self) -> torch.Size:
        return self._shape

    @property
    def label(self) -> str:
        return "int8"

    @property
    def nbytes(self) -> int:
        return self.numel() + self.scale.nbytes

    @property
    def codes(self) -> Tensor:
        """The codes [out, in], int8."""
        if self.packed is not None:
            return self.packed.opaque.to_dense().mT.contiguous()
        assert self.unpacked is not None
        return self.unpacked

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return (self.codes.float() * self.scale[:, None]).to(dtype)

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> Int8Weight:
        return Int8Weight(change(self.codes), change(self.scale))


class Int8Linear(CPULinear, QuantizedLinear):
    """A linear layer that multiplies in int8: y = s_x s_w (q_x . q_w) + b, with 32-bit sums.

    The weight's scale s_w has one element per row; inputs are quantized at each call, s_x per token: the
    largest magnitude over the largest code (dynamic W8A8; Dettmers et al., arXiv:2208.07339, eq. 5, without
    the decomposition of outliers). A row or token of zeros has scale 0 and codes 0. The error grows with the
    ratio of the largest to the typical magnitude in a row or token, and is 1.6 times as large where
    `largest_weight_code` is 64. On other devices and for inputs that need a gradient, the weight is
    dequantized.
    """

    def __init__(
        self, quantized: Int8Weight, bias: Tensor | None, dtype: torch.dtype, qkv_dim: int | None = None
    ) -> None:
        super().__init__(quantized, bias, dtype)
        self.qkv_dim = self.out_features if qkv_dim is None else qkv_dim

    def matmul(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.device.type != "cpu" or x.requires_grad:
            return F.linear(x, self.quantized.moved_to(x.device).dequantize(x.dtype), bias)
        codes, scale = quantize_rows(x.reshape(-1, self.in_features))
        y, scale = self._sums(codes, x.dtype), scale[:, None]
        out = None if torch.compiler.is_compiling() else y  # allocating takes longer than the sums
        y = torch.mul(y, scale, out=out) if bias is None else torch.addcmul(bias, y, scale, out=out)
        return y.unflatten(0, x.shape[:-1])

    def gelu(self, x: Tensor) -> Tensor:
        return gelu_in_float32(self(x))

    def split_gelu(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self(x)
        return y[..., : self.qkv_dim], gelu_in_float32(y[..., self.qkv_dim :])

    def _sums(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """s_w (q_x . q_w) [N, out] in `dtype`."""
        weight = cast(Int8Weight, self.quantized)
        if weight.packed is None:
            return (torch.ops.aten._int_mm(codes, weight.codes.mT) * weight.scale).to(dtype)
        multiply = packed_int8_matmul if torch.compiler.is_compiling() else _int8_matmul
        out = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        return multiply(codes, weight.packed, weight.scale, weight.zero_points, out).to(dtype)


def quantize_int8(weight: Tensor) -> Int8Weight:
    """A weight [out, in] in int8."""
    return Int8Weight(*quantize_rows(weight.detach().float(), largest_weight_code()))


def quantize_rows(x: Tensor, largest: int = LARGEST) -> tuple[Tensor, Tensor]:
    """int8 codes [N, C] and scales [N] in x's dtype with x [N, C] close to scale * code.

    A row's scale is its largest magnitude over the `largest` code; ties are rounded to even codes.
    """
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = x.new_empty(len(x))
    for rows in row_slices(x):
        part = x[rows]
        scale[rows] = torch.maximum(part.amax(-1), -part.amin(-1)) / largest
        inverse = torch.where(scale[rows] > 0, 1 / scale[rows].float(), 0.0)
        codes[rows] = (part * inverse[:, None]).round_().clamp_(-largest, largest)
    return codes, scale


def largest_weight_code() -> int:
    """The largest code that a weight may have so that oneDNN's int8 sums are exact on this CPU.

    Without VNNI an x86 CPU adds pairs of products in 16 bits, with the inputs' codes shifted by 128 to at
    most 255: 2 x 255 x 64 is the most that fits (oneDNN's guide, "Nuances of int8 computations").
    """
    return _largest_weight_code() if can_pack(torch.device("cpu"), torch.int8) else LARGEST


@functools.cache
def _largest_weight_code() -> int:
    return largest_exact_code(_int8_matmul)


def largest_exact_code(matmul: Callable[..., Tensor]) -> int:
    """`largest_weight_code` of a CPU with this int8 matmul, by a trial with the largest codes."""
    codes = torch.full((16, 64), LARGEST, dtype=torch.int8)
    weight = PackedWeight(torch.ops.onednn.qlinear_prepack(codes, None))
    y = matmul(codes, weight, torch.ones(16), torch.zeros(16, dtype=torch.int32), torch.float32)
    return LARGEST if bool((y == 64 * LARGEST**2).all()) else LARGEST_WITHOUT_VNNI


def _int8_matmul(
    codes: Tensor, weight: PackedWeight, scale: Tensor, zero_points: Tensor, dtype: torch.dtype
) -> Tensor:
    """scale * (codes . weight) [N, out] in `dtype`, by oneDNN.

    The inputs' codes are passed as unsigned, shifted by 128: oneDNN multiplies signed ones a thousand times
    as slowly on CPUs with VNNI and without AMX.
    """
    unsigned = codes.view(torch.uint8) ^ 128
    return torch.ops.onednn.qlinear_pointwise(
        unsigned, 1.0, 128, weight.opaque, scale, zero_points, None, 1.0, 0, dtype, "none", [], ""
    )


def _like_int8_matmul(
    codes: Tensor, weight: Any, scale: Tensor, zero_points: Any, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(codes.shape[0], scale.shape[0], dtype=dtype)


@packed_operator("rectiflux::packed_int8_matmul", _like_int8_matmul)
def packed_int8_matmul(
    codes: Tensor, weight: PackedWeight, scale: Tensor, zero_points: Tensor, dtype: torch.dtype
) -> Tensor:
    """scale * (codes [N, in] . packed weight [out, in]) in `dtype`."""
    return _int8_matmul(codes, weight, scale, zero_points, dtype)
