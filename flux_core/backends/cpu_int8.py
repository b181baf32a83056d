"""Linear layers that multiply in int8 on the CPU, through oneDNN: a trade, speed for exactness."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cpu_linear import _BLOCKS, Blocks, CPULinear, _slices, can_pack, gelu_in_slices

LEVELS = 127
"""The largest code: from -127 to 127, so that a number and its negative have codes that are equally exact."""

FEWER_LEVELS = 64
"""The largest code of a weight on processors that add two products in 16 bits, which wider codes overflow."""


def max_weight_code() -> int:
    """The largest code that a weight may have here so that oneDNN's int8 sums are exact.

    Without VNNI an x86 processor adds pairs of products in 16 bits, the inputs' codes shifted by 128: with
    255 from there, 2 x 255 x 64 is the most that they hold (oneDNN's guide, "Nuances of int8 computations").
    """
    return _levels_tried() if can_pack(torch.device("cpu"), torch.int8) else LEVELS


@functools.cache
def _levels_tried() -> int:
    most = torch.full((16, 64), LEVELS, dtype=torch.int8)
    blocks = torch.ops.onednn.qlinear_prepack(most, None)
    y = _int8_sums(most, blocks, torch.ones(16), torch.zeros(16, dtype=torch.int32), torch.float32)
    return LEVELS if bool((y == 64 * LEVELS**2).all()) else FEWER_LEVELS


def _int8_sums(codes: Tensor, blocks: Tensor, scale: Tensor, zeros: Tensor, out: torch.dtype) -> Tensor:
    """scale (codes . weight's codes) [N, out], by oneDNN.

    It is handed the inputs' codes as numbers without sign, 128 more than they are: so it is quick everywhere.
    Signed ones it multiplies a thousand times as slowly on processors with VNNI and without AMX.
    """
    unsigned = codes.view(torch.uint8) ^ 128
    return torch.ops.onednn.qlinear_pointwise(
        unsigned, 1.0, 128, blocks, scale, zeros, None, 1.0, 0, out, "none", [], ""
    )


class Int8Linear(CPULinear):
    """A linear layer that multiplies in int8: y = s_x s_w (q_x . q_w) + b, with 32-bit sums.

    The weight is quantised once, its scale s_w one for each row; the inputs at each call, s_x one for each
    token: the largest magnitude over the largest code, 127, for weights `max_weight_code` (dynamic W8A8;
    Dettmers et al., arXiv:2208.07339, eq. 5, without the part for outliers). A row or token of zeros has
    scale 0 and codes 0. What is lost grows with the ratio of the largest to the usual magnitude in a row or
    token, and is 1.6 times as much where weights have 64 levels.
    """

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The numbers that the codes stand for."""
        return (self.codes.float() * self.scale[:, None]).to(dtype)

    @property
    def codes(self) -> Tensor:
        """The weight's codes [out, in], int8."""
        codes = self._codes
        return codes.opaque.to_dense().mT.contiguous() if isinstance(codes, Blocks) else codes

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., in] times the transpose of the weight, plus a bias [out]: [..., out]."""
        if x.device.type != "cpu" or x.requires_grad:
            return F.linear(x, self.dense_weight(x.dtype), bias)
        codes, scale = quantize_rows(x.reshape(-1, self.in_features))
        y, scale = self._sums(codes, x.dtype), scale[:, None]
        out = None if torch.compiler.is_compiling() else y  # new memory takes longer than the sums
        y = torch.mul(y, scale, out=out) if bias is None else torch.addcmul(bias, y, scale, out=out)
        return y.unflatten(0, x.shape[:-1])

    def gelu(self, x: Tensor) -> Tensor:
        return gelu_in_slices(self(x))

    def split_gelu(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self(x)
        return y[..., : self.qkv_dim], gelu_in_slices(y[..., self.qkv_dim :])

    def _sums(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """s_w (q_x . q_w) [N, out] in `dtype`."""
        if not isinstance(self._codes, Blocks):
            return (torch.ops.aten._int_mm(codes, self._codes.mT) * self.scale).to(dtype)
        out = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        if torch.compiler.is_compiling():
            return _int8_product(codes, self._codes.number, self.scale, self._zeros, out).to(dtype)
        return _int8_sums(codes, self._codes.opaque, self.scale, self._zeros, out).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, int8, computed in {self.dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        """Codes and scales stay what they are through every change of dtype."""
        nn.Module._apply(self, fn, recurse)
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if probe.device != self.device:
            self._place(self.codes.to(probe.device), self.scale.to(probe.device))
        self._dtype, self._device = probe.dtype, probe.device
        return self

    def _keep(self, weight: Tensor) -> None:
        super()._keep(weight)
        self._place(*quantize_rows(weight.float(), max_weight_code()))

    def _place(self, codes: Tensor, scale: Tensor) -> None:
        self._codes: Blocks | Tensor = codes
        self.scale = scale
        if can_pack(codes.device, torch.int8):
            self._codes = Blocks(torch.ops.onednn.qlinear_prepack(codes, None))
            self._zeros = torch.zeros(len(codes), dtype=torch.int32)


@torch.library.custom_op("rectiflux::int8_product", mutates_args=())
def _int8_product(codes: Tensor, number: Tensor, scale: Tensor, zeros: Tensor, dtype: torch.dtype) -> Tensor:
    """`_int8_sums` with numbered blocks, for compiled code."""
    return _int8_sums(codes, _BLOCKS[int(number)].opaque, scale, zeros, dtype)


@_int8_product.register_fake
def _(codes: Tensor, number: Tensor, scale: Tensor, zeros: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape[0], scale.shape[0], dtype=dtype)


def quantize_rows(x: Tensor, levels: int = LEVELS) -> tuple[Tensor, Tensor]:
    """Codes [N, C], int8, and scales [N] in x's dtype, of numbers [N, C], x about scale * code.

    A row's scale is its largest magnitude over the largest code, `levels`; the nearest code, of two equally
    near the even one.
    """
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = x.new_empty(len(x))
    for rows in _slices(x):
        part = x[rows]
        scale[rows] = torch.maximum(part.amax(-1), -part.amin(-1)) / levels
        inverse = torch.where(scale[rows] > 0, 1 / scale[rows].float(), 0.0)
        codes[rows] = (part * inverse[:, None]).round_().clamp_(-levels, levels)
    return codes, scale
