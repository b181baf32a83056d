"""Linear layers whose weights were reordered once for the processor: by oneDNN, in float32, bfloat16 or int8.

torch's own layers hand their weight over in rows at every call, and oneDNN puts it into the blocks that the
processor multiplies before it begins (in float32 torch may call MKL instead, which does the same). A layer
here keeps nothing but the blocks, so that memory does not double, and does a GELU within the product or after
it in place, whichever is quicker on the processor. int8 is a trade, speed for exactness; see `Int8Linear`.
Which layers of a model are packed is said in packing.py.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quant.linear import OpaqueWeightLinear

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


class CPULinear(OpaqueWeightLinear):
    """What the layers here share: a bias, a weight that `_keep` keeps, and GELU (tanh) of the outputs.

    The first `qkv_dim` outputs, all of them unless given, are those that `split_gelu` leaves as they are.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, qkv_dim: int | None = None) -> None:
        super().__init__(weight.shape[0], weight.shape[1], weight.dtype)
        self.qkv_dim = weight.shape[0] if qkv_dim is None else qkv_dim
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(weight), requires_grad=False)
        self._keep(weight.detach())

    def _keep(self, weight: Tensor) -> None:
        """Keep a weight [out, in] where it is, to compute in its dtype."""
        self._dtype, self._device = weight.dtype, weight.device

    def gelu(self, x: Tensor) -> Tensor:
        """GELU of the outputs."""
        return F.gelu(self(x), approximate="tanh")

    def split_gelu(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The first `qkv_dim` outputs as they are, and the rest through GELU."""
        y = self(x)
        return y[..., : self.qkv_dim], F.gelu(y[..., self.qkv_dim :], approximate="tanh")

    @property
    def device(self) -> torch.device:
        return self._device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CPULinear:
        """What `to`, `cuda` and `half` come down to."""
        super()._apply(fn, recurse)
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if probe.dtype != self.dtype or probe.device != self.device:
            self._keep(fn(self.dense_weight(self.dtype)))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.dense_weight(self.dtype)


class PackedLinear(CPULinear):
    """A linear layer with its weight in oneDNN's blocks, exact.

    With `qkv_dim` below the number of outputs these are kept apart from the rest. Where nothing can be packed
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

    def split_gelu(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if len(self._kept) == 2 and self._reads(x):
            return self._product(0, x), self._gelu_product(1, x)
        return super().split_gelu(x)

    def extra_repr(self) -> str:
        form = "oneDNN's blocks" if self.packed else "rows"
        return f"{self.in_features}, {self.out_features}, {self.dtype} in {form}"

    def _keep(self, weight: Tensor) -> None:
        super()._keep(weight)
        self._kept: list[Blocks | Tensor] = [weight]
        if can_pack(weight.device, weight.dtype):
            reorder = torch.ops.mkldnn._reorder_linear_weight
            parts = [weight[: self.qkv_dim], weight[self.qkv_dim :]]
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
            bias = bias[: self.qkv_dim] if part == 0 else bias[self.qkv_dim :]
        assert isinstance(blocks, Blocks)
        if torch.compiler.is_compiling():
            outputs = self.qkv_dim if part == 0 else self.out_features - self.qkv_dim
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
