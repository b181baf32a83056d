"""Linear layers that multiply in 8-bit floats: faster and smaller than bf16, and less exact.

y = s_x s_w (q_x . q_w) + b with codes q in float8_e4m3fn. The weight is quantized once, with a scale s_w per
row; the inputs at each call, with s_x per token: the largest magnitude over 448 (Micikevicius et al.,
arXiv:2209.05433). A code has 3 bits of mantissa, a relative error of at most 1/16.

The relative error of the velocity of the miniature [dev] in bf16 (`bench speed --cases fp8`), a mean over
sigmas 1, 0.9, 0.7, 0.5, 0.3, 0.1, with one kind of layer in fp8 (with none: 0.011):

  double blocks  qkv 0.013, proj 0.013, MLP in 0.022, MLP out 0.018
  single blocks  linear1 0.040, linear2 0.035; both of one block 0.015, 0.019, 0.023, 0.028, last 0.036
  modulations    0.019
  stay in bf16   img_in 0.052, final_layer 0.030, the last single block
  all layers that quantize.quantize_to_fp8 chooses: 0.050 (with the last single block 0.062, all layers 0.086)

Modulations are quantized for memory, not for speed: they are 27 % of FLUX.1 [dev].
"""

from __future__ import annotations

import functools
import logging
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant.formats import ConcatenatedWeight, DenseWeight, QuantizedWeight, ScaledWeight
from ..quant.linear import QuantizedLinear

log = logging.getLogger(__name__)

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
"""The largest code: 448."""

SMALLEST = 1e-12
"""The smallest scale times 448: rows and tokens below it are as good as zero."""

MULTIPLE = 16
"""The sides of a weight must be multiples of it, which fp8 matmuls on GPUs read at a time."""


class Fp8Linear(QuantizedLinear):
    """A linear layer that multiplies in fp8 where the GPU can, and computes the same values elsewhere.

    Its weight is float8_e4m3fn codes [out, in] with scales [out, 1]. For inputs that need a gradient, and on
    devices without fp8, where it is a `LookupWeight`, it is dequantized.
    """

    def __init__(self, quantized: ScaledWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        scale = quantized.scale.float().expand(quantized.shape[0], 1).contiguous()
        super().__init__(ScaledWeight(quantized.codes.contiguous(), scale), bias, dtype)

    def matmul(self, x: Tensor, bias: Tensor | None) -> Tensor:
        scaled = cast(ScaledWeight, self.quantized)
        codes, scale = scaled.codes, scaled.scale
        if x.requires_grad or codes.dtype != FP8:
            return super().matmul(x, bias)
        inputs = x.reshape(-1, self.in_features)
        weight = codes.to(x.device), scale.to(x.device)
        if torch.compiler.is_compiling() and not can_multiply(x.device):
            y = fp8_matmul(inputs, *weight, bias)
        else:
            y = multiply(quantize_rows_fp8(inputs), weight, bias, x.dtype)
        return y.view(*x.shape[:-1], self.out_features)


def quantize_rows_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn codes [N, C] and float32 scales [N, 1] with x [N, C] close to scale * code."""
    scale = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True).float().clamp_min(SMALLEST) / LARGEST
    return (x / scale).to(FP8), scale  # divided in float32, the scale's dtype


def multiply(
    x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x [N, in] times the transposed weight [out, in], plus a bias [out]: [N, out] in `dtype`.

    Both are codes and a scale per row. Where the GPU multiplies fp8, the result is rounded to bfloat16 once,
    after the bias; elsewhere the codes are multiplied in bfloat16 or float32, which represent them exactly.
    """
    (x_codes, x_scale), (codes, scale) = x, weight
    if can_multiply(x_codes.device):
        return _scaled_mm(x, weight, None if bias is None else bias.to(torch.bfloat16)).to(dtype)
    exact = torch.float32 if x_codes.device.type == "cpu" else torch.bfloat16
    inputs, dense = DenseWeight(x_codes).dequantize(exact), DenseWeight(codes).dequantize(exact)
    y = F.linear(inputs, dense).float() * x_scale * scale.t()
    return (y if bias is None else y + bias).to(dtype)


@torch.library.custom_op("rectiflux::fp8_matmul", mutates_args=())
def fp8_matmul(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x times an fp8 weight, for compiled code on devices where neither matmuls nor compilers support fp8."""
    return multiply(quantize_rows_fp8(x), (codes, scale), bias, x.dtype)


@fp8_matmul.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


def _scaled_mm(x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
    """The GPU's fp8 matmul, [N, out] in bfloat16; its sums have more bits than codes, fewer than float32."""
    return torch.ops.aten._scaled_mm(
        x[0],
        weight[0].t(),
        x[1],
        weight[1].t(),
        bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def can_multiply(device: torch.device) -> bool:
    """Whether a device multiplies fp8 with a scale per row: NVIDIA GPUs of compute capability 8.9 and up.

    Tried once, because some builds of torch lack the kernel for some of these (pytorch#192707).
    """
    return device.type == "cuda" and _succeeds(device)


# all that torch.compiler.assume_constant_result does, which imports torch._dynamo: 1.2 s of every start
can_multiply._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions take any attribute


@functools.cache
def _succeeds(device: torch.device) -> bool:
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 9):
        return False
    ones = torch.ones(MULTIPLE, MULTIPLE, device=device)
    try:
        y = _scaled_mm(quantize_rows_fp8(ones), quantize_rows_fp8(ones), ones[0].to(torch.bfloat16))
        return bool((y == MULTIPLE + 1).all())
    except (RuntimeError, AttributeError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        log.warning("fp8 is multiplied as bf16, torch cannot on %s: %s", device, reason)
        return False


def to_fp8(weight: Tensor | QuantizedWeight) -> ScaledWeight:
    """A weight [out, in] in fp8; float8_e4m3fn weights keep their own codes."""
    if isinstance(weight, ConcatenatedWeight):
        parts = [to_fp8(part) for part in weight.parts]
        scales = [part.scale.float().expand(part.shape[0], 1) for part in parts]
        codes = torch.cat([part.codes.view(torch.uint8) for part in parts]).view(FP8)
        return ScaledWeight(codes, torch.cat(scales))
    if isinstance(weight, ScaledWeight) and weight.codes.dtype == FP8:
        return weight
    if isinstance(weight, DenseWeight) and weight.values.dtype == FP8:
        return ScaledWeight(weight.values, torch.ones((), device=weight.device))
    values = weight if isinstance(weight, Tensor) else weight.dequantize(torch.float32)
    return ScaledWeight(*quantize_rows_fp8(values))
