"""Linear layers whose weights were reordered once for the processor: by oneDNN, in float32, bfloat16 or int8.

torch's own layers hand their weight over in rows at every call, and oneDNN puts it into the blocks that the
processor multiplies before it begins (in float32 torch may call MKL instead, which does the same). A layer
here keeps nothing but the blocks, so that memory does not double, and does a GELU within the product or after
it in place, whichever is quicker on the processor. int8 is a trade, speed for exactness; see `Int8Linear`.
Which layers of a model are packed is said in packing.py.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quant.linear import KeptLinear

LEVELS = 127
"""The largest code: from -127 to 127, so that a number and its negative have codes that are equally exact."""

FEWER_LEVELS = 64
"""The largest code of a weight on processors that add two products in 16 bits, which wider codes overflow."""

SLICE = 1 << 17
"""Numbers that are worked on at a time where each is passed over more than once."""


class Blocks:
    """A weight in the order that oneDNN chose. It is never written to, so that copies of a layer share it.

    Compiled code can't take such a tensor: it is told the `number`, a tensor too, so that every layer's fits.
    """

    def __init__(self, opaque: Tensor) -> None:
        self.opaque = opaque
        self.number = torch.tensor(next(_NUMBERS))
        _BLOCKS[int(self.number)] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Blocks:
        return self


_NUMBERS = itertools.count()
_BLOCKS: weakref.WeakValueDictionary[int, Blocks] = weakref.WeakValueDictionary()


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch on this processor reorders weights of a dtype (float32, bfloat16, int8)."""
    ops = torch.ops
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.int8:
        return hasattr(ops.onednn, "qlinear_prepack") and hasattr(ops.onednn, "qlinear_pointwise")
    if not (hasattr(ops.mkldnn, "_reorder_linear_weight") and hasattr(ops.mkldnn, "_linear_pointwise")):
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and bool(ops.mkldnn._is_mkldnn_bf16_supported())
    )


def has_avx512() -> bool:
    """Whether torch computes with AVX-512 here, as MKL and oneDNN do then."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def mkl_is_slow() -> bool:
    """Whether MKL, torch's own in float32, leaves AVX-512 unused that oneDNN uses: on AMD's processors.

    On one core of an EPYC (Zen 5) from 3072 to 3072 for 256 tokens 104 against 242 GFLOP/s.
    """
    capabilities = getattr(torch.cpu, "get_capabilities", dict)  # older torch has none
    return has_avx512() and str(capabilities().get("cpu_name", "")).startswith("AMD")


def weight_levels() -> int:
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


class ReorderedLinear(KeptLinear):
    """What the layers here share: a bias, a weight that `_keep` keeps, and GELU (tanh) of the outputs.

    The first `plain` outputs, all of them unless given, are those that `plain_and_gelu` leaves as they are.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, plain: int | None = None) -> None:
        super().__init__(weight.shape[0], weight.shape[1], weight.dtype)
        self.plain = weight.shape[0] if plain is None else plain
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(weight), requires_grad=False)
        self._keep(weight.detach())

    def _keep(self, weight: Tensor) -> None:
        """Keep a weight [out, in] where it is, to compute in its dtype."""
        self._dtype, self._device = weight.dtype, weight.device

    def gelu(self, x: Tensor) -> Tensor:
        """GELU of the outputs."""
        return F.gelu(self(x), approximate="tanh")

    def plain_and_gelu(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The first `plain` outputs as they are, and the rest through GELU."""
        y = self(x)
        return y[..., : self.plain], F.gelu(y[..., self.plain :], approximate="tanh")

    @property
    def device(self) -> torch.device:
        return self._device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ReorderedLinear:
        """What `to`, `cuda` and `half` come down to."""
        super()._apply(fn, recurse)
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if probe.dtype != self.dtype or probe.device != self.device:
            self._keep(fn(self.dense_weight(self.dtype)))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.dense_weight(self.dtype)


class PackedLinear(ReorderedLinear):
    """A linear layer with its weight in oneDNN's blocks, exact.

    With `plain` below the number of outputs these are kept apart from the rest. Where nothing can be packed
    (another device or dtype) the weight stays in rows, and for inputs that want a gradient it is put back in
    rows at each call. No gradient reaches the weight.
    """

    @property
    def packed(self) -> bool:
        """Whether the weight is in blocks."""
        return isinstance(self._kept[0], Blocks)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        rows = [part.opaque.to_dense() if isinstance(part, Blocks) else part for part in self._kept]
        return (rows[0] if len(rows) == 1 else torch.cat(rows)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not self._reads(x):
            return F.linear(x, self.dense_weight(x.dtype), self.bias)
        parts = [self._product(i, x) for i in range(len(self._kept))]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def gelu(self, x: Tensor) -> Tensor:
        if len(self._kept) == 1 and self._reads(x):
            return self._gelu_product(0, x)
        return super().gelu(x)

    def plain_and_gelu(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if len(self._kept) == 2 and self._reads(x):
            return self._product(0, x), self._gelu_product(1, x)
        return super().plain_and_gelu(x)

    def extra_repr(self) -> str:
        form = "oneDNN's blocks" if self.packed else "rows"
        return f"{self.in_features}, {self.out_features}, {self.dtype} in {form}"

    def _keep(self, weight: Tensor) -> None:
        super()._keep(weight)
        self._kept: list[Blocks | Tensor] = [weight]
        if can_pack(weight.device, weight.dtype):
            reorder = torch.ops.mkldnn._reorder_linear_weight
            parts = [weight[: self.plain], weight[self.plain :]]
            self._kept = [Blocks(reorder(part.contiguous(), None)) for part in parts if len(part)]

    def _reads(self, x: Tensor) -> bool:
        """Whether the blocks can be multiplied by x."""
        return self.packed and x.dtype == self.dtype and x.numel() > 0 and not x.requires_grad

    def _gelu_product(self, part: int, x: Tensor) -> Tensor:
        """GELU of a part's outputs.

        With AVX-512 while they are in the cache. With AVX2 alone oneDNN's own tanh takes longer than passes
        over slices of them: 208 against 161 ms from 3072 to 12288 for 256 tokens, with torch's own GELU. To a
        compiler it stays one operation.
        """
        if torch.compiler.is_compiling() or has_avx512():
            return self._product(part, x, "gelu", "tanh")
        y = self._product(part, x)
        return gelu(y, out=y)

    def _product(self, part: int, x: Tensor, after: str = "none", how: str = "") -> Tensor:
        bias, blocks = self.bias, self._kept[part]
        if bias is not None and len(self._kept) == 2:
            bias = bias[: self.plain] if part == 0 else bias[self.plain :]
        assert isinstance(blocks, Blocks)
        if torch.compiler.is_compiling():
            outputs = self.plain if part == 0 else self.out_features - self.plain
            return _packed_product(x, blocks.number, bias, outputs, after, how)
        return torch.ops.mkldnn._linear_pointwise(x, blocks.opaque, bias, after, [], how)


@torch.library.custom_op("rectiflux::packed_product", mutates_args=())
def _packed_product(
    x: Tensor, number: Tensor, bias: Tensor | None, outputs: int, after: str, how: str
) -> Tensor:
    """A product with numbered blocks [outputs, in], for compiled code."""
    blocks = _BLOCKS[int(number)]
    return torch.ops.mkldnn._linear_pointwise(x, blocks.opaque, bias, after, [], how)


@_packed_product.register_fake
def _(x: Tensor, number: Tensor, bias: Tensor | None, outputs: int, after: str, how: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


class Int8Linear(ReorderedLinear):
    """A linear layer that multiplies in int8: y = s_x s_w (q_x . q_w) + b, with 32-bit sums.

    The weight is quantised once, its scale s_w one for each row; the inputs at each call, s_x one for each
    token: the largest magnitude over the largest code, 127, for weights `weight_levels` (dynamic W8A8;
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
        codes, scale = quantise_rows(x.reshape(-1, self.in_features))
        y, scale = self._sums(codes, x.dtype), scale[:, None]
        out = None if torch.compiler.is_compiling() else y  # new memory takes longer than the sums
        y = torch.mul(y, scale, out=out) if bias is None else torch.addcmul(bias, y, scale, out=out)
        return y.unflatten(0, x.shape[:-1])

    def gelu(self, x: Tensor) -> Tensor:
        return gelu_in_slices(self(x))

    def plain_and_gelu(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self(x)
        return y[..., : self.plain], gelu_in_slices(y[..., self.plain :])

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
        self._place(*quantise_rows(weight.float(), weight_levels()))

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


def quantise_rows(x: Tensor, levels: int = LEVELS) -> tuple[Tensor, Tensor]:
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


def gelu(x: Tensor, out: Tensor | None = None) -> Tensor:
    """GELU (tanh) of x [..., C], written to `out` if that is given, which may be x, as quick as may be here.

    With AVX2 alone torch's tanh takes longer than `_sigmoid_part`, which passes over slices that are in the
    cache: on two threads 162 against 83 us for 96 tokens of 768, 20 against 15 ms for 768 of 12288.
    """
    out = torch.empty_like(x) if out is None else out
    if x.dtype != torch.float32 or x.device.type != "cpu" or has_avx512():
        return torch.ops.aten.gelu.out(x, approximate="tanh", out=out)
    flat, result = x.view(-1, x.shape[-1]), out.view(-1, x.shape[-1])
    for rows in _slices(flat):
        torch.mul(_sigmoid_part(flat[rows]), flat[rows], out=result[rows])
    return out


def gelu_in_slices(x: Tensor) -> Tensor:
    """GELU (tanh) of x [..., C], computed in float32.

    What torch's own gives to rounding, in two thirds of its time in bfloat16.
    """
    flat = x.reshape(-1, x.shape[-1])
    result = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    for rows in _slices(flat):
        y = flat[rows].float()
        result[rows] = _sigmoid_part(y).mul_(y)
    return result.view(x.shape)


def _sigmoid_part(x: Tensor) -> Tensor:
    """What GELU (tanh) multiplies x by: sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))."""
    factor = 2 * (2 / torch.pi) ** 0.5
    return torch.addcmul(x.new_tensor(factor), x, x, value=0.044715 * factor).mul_(x).sigmoid_()


def _slices(x: Tensor) -> list[slice]:
    """The rows of x [N, C] in slices that stay in the cache over several passes; compiled, in one."""
    if torch.compiler.is_compiling():
        return [slice(None)]
    step = max(1, SLICE // max(1, x.shape[1]))
    return [slice(start, start + step) for start in range(0, len(x), step)]
