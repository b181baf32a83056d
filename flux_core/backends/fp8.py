"""Linear layers that multiply in 8-bit floats: a trade, speed and memory for exactness.

y = s_x s_w (q_x . q_w) + b with codes q in float8_e4m3fn. The weight is quantised once, its scale s_w one for
each row; the inputs at each call, s_x one for each token: the largest magnitude over 448 (Micikevicius et
al., arXiv:2209.05433). A code has 3 bits of mantissa, so that a number errs by at most 1/16 of itself.
What this does to FLUX, on the miniature [dev] (`bench speed --cases fp8`): the relative error of the velocity
in bf16, a mean over sigmas 1, 0.9, 0.7, 0.5, 0.3, 0.1, with one kind of layer in fp8 (with none: 0.011):

  double blocks  qkv 0.013, proj 0.013, MLP in 0.022, MLP out 0.018
  single blocks  linear1 0.040, linear2 0.035; both of one block 0.015, 0.019, 0.023, 0.028, last 0.036
  modulations    0.019
  kept in bf16   img_in 0.052, final_layer 0.030, the last single block
  all that packing.quantize_to_fp8 chooses: 0.050 (with the last single block 0.062, with every layer 0.086)

Modulations serve memory, not speed: they are 27 % of FLUX.1 [dev].
"""

from __future__ import annotations

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant.formats import ConcatenatedWeight, DenseWeight, QuantizedWeight, ScaledWeight
from ..quant.linear import QuantizedLinear

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
"""The largest code: 448."""

SMALLEST = 1e-12
"""Rows and tokens that hold nothing larger are as good as zero."""

STEP = 16
"""Sides of a weight must be multiples of it: what the cards' products read at a time."""


class Fp8Linear(QuantizedLinear):
    """A linear layer that multiplies in fp8 where the card can, and gives the same numbers where it cannot.

    Its weight is a `ScaledWeight` of float8_e4m3fn codes [out, in] and scales [out, 1]. For inputs that need
    a gradient, and once it has been on a device without fp8, the weight is dequantized. No gradient reaches
    the weight.
    """

    stored_codes: Tensor
    stored_scale: Tensor

    def __init__(self, stored: ScaledWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        scale = stored.scale.float().expand(stored.shape[0], 1).contiguous()
        super().__init__(ScaledWeight(stored.codes.contiguous(), scale), bias, dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.requires_grad or self.stored_codes.dtype != FP8:
            return super().product(x, bias)
        inputs = x.reshape(-1, self.in_features)
        weight = self.stored_codes.to(x.device), self.stored_scale.to(x.device)
        if torch.compiler.is_compiling() and not can_multiply(x.device):
            y = _as_numbers(inputs, *weight, bias)
        else:
            y = multiply(quantize_rows_fp8(inputs), weight, bias, x.dtype)
        return y.view(*x.shape[:-1], self.out_features)


def quantize_rows_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [N, C], float8_e4m3fn, and scales [N, 1], float32, of numbers [N, C], x about scale * code."""
    scale = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True).float().clamp_min(SMALLEST) / LARGEST
    return (x / scale).to(FP8), scale  # in float32, which is the scale's


def multiply(
    x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x [N, in] times the transpose of a weight [out, in], plus a bias [out]: [N, out] in `dtype`.

    Both are codes with a scale for each row. Where the card multiplies fp8 the result is rounded to bfloat16
    once, after the bias; elsewhere the codes, which are exact in bfloat16 too, are multiplied as numbers.
    """
    (x_codes, x_scale), (codes, scale) = x, weight
    if can_multiply(x_codes.device):
        return _product(x, weight, None if bias is None else bias.to(torch.bfloat16)).to(dtype)
    numbers = torch.float32 if x_codes.device.type == "cpu" else torch.bfloat16
    y = (
        F.linear(DenseWeight(x_codes).dequantize(numbers), DenseWeight(codes).dequantize(numbers)).float()
        * x_scale
        * scale.t()
    )
    return (y if bias is None else y + bias).to(dtype)


@torch.library.custom_op("rectiflux::fp8_as_numbers", mutates_args=())
def _as_numbers(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x times a weight in fp8, for compiled code where the card cannot: neither can its compiler read fp8."""
    return multiply(quantize_rows_fp8(x), (codes, scale), bias, x.dtype)


@_as_numbers.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


def _product(x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
    """By the card's fp8, [N, out] in bfloat16; its sums keep more bits than codes, fewer than float32."""
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
    """Whether a device multiplies fp8 with a scale for each row: NVIDIA cards of capability 8.9 and up.

    Tried once, because not every build of torch has the product for each of these (pytorch#192707).
    """
    return device.type == "cuda" and _tried(device)


# all that torch.compiler.assume_constant_result does, which imports torch._dynamo: 1.2 s of every start
can_multiply._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions take any attribute


@functools.cache
def _tried(device: torch.device) -> bool:
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 9):
        return False
    ones = torch.ones(STEP, STEP, device=device)
    try:
        y = _product(quantize_rows_fp8(ones), quantize_rows_fp8(ones), ones[0].to(torch.bfloat16))
        return bool((y == STEP + 1).all())
    except (RuntimeError, AttributeError) as error:
        what = (str(error).splitlines() or ["no reason given"])[0]
        logging.getLogger(__name__).warning("fp8 is multiplied as bf16, torch cannot on %s: %s", device, what)
        return False


def to_fp8(weight: Tensor | QuantizedWeight) -> ScaledWeight:
    """A weight [out, in] in fp8; where a file has float8_e4m3fn its own codes, so that nothing is lost."""
    if isinstance(weight, ConcatenatedWeight):
        parts = [to_fp8(part) for part in weight.parts]
        scales = [part.scale.float().expand(part.shape[0], 1) for part in parts]
        return ScaledWeight(
            torch.cat([part.codes.view(torch.uint8) for part in parts]).view(FP8), torch.cat(scales)
        )
    if isinstance(weight, ScaledWeight) and weight.codes.dtype == FP8:
        return weight
    if isinstance(weight, DenseWeight) and weight.values.dtype == FP8:
        return ScaledWeight(weight.values, torch.ones((), device=weight.device))
    return ScaledWeight(
        *quantize_rows_fp8(weight if isinstance(weight, Tensor) else weight.dequantize(torch.float32))
    )
