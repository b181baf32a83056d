"""Quantized weights of every format with their dequantized values, computed without flux_core."""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from ...flux_core.quant.formats import (
    ConcatenatedWeight,
    DenseWeight,
    GGUFWeight,
    QuantizedWeight,
    ScaledWeight,
)
from ...flux_core.quant.four_bit import FourBitWeight, NestedScales
from ...flux_core.quant.gguf import BLOCK_TYPES

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""The sixteen levels of NF4 (Dettmers et al., arXiv:2305.14314, appendix E)."""

HALVES = {
    **dict.fromkeys(("Q8_0", "Q5_0", "Q4_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q5_1", "Q4_1", "Q5_K", "Q4_K"), (0, 2)),
    "Q6_K": (208,),
    "Q3_K": (108,),
    "Q2_K": (80, 82),
}
"""Byte offsets of a block's float16 scales: random bytes there could be NaN or inf."""

QUANTIZABLE = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""Types that the gguf package can quantize to; the others it can only dequantize."""


def random_blocks(kind: str, rows: int, blocks: int, seed: int = 0, largest: float = 0.1) -> np.ndarray:
    """Bytes [rows, blocks * bytes], every bit random but for scales up to `largest`, a few of them zero."""
    rng = np.random.default_rng(seed)
    size = BLOCK_TYPES[kind].bytes
    if kind in ("F32", "F16", "BF16"):
        return quantize_gguf(rng.standard_normal((rows, blocks)).astype(np.float32), kind)
    data = rng.integers(0, 256, (rows * blocks, size), dtype=np.uint8)
    for start in HALVES[kind]:
        scale = rng.uniform(-largest, largest, (rows * blocks, 1)).astype(np.float16)
        scale[::7] = 0
        data[:, start : start + 2] = scale.view(np.uint8)
    return data.reshape(rows, blocks * size)


def quantize_gguf(values: np.ndarray, kind: str) -> np.ndarray:
    """Bytes of float32 values, quantized by the gguf package."""
    return quants.quantize(values, GGMLQuantizationType[kind]).view(np.uint8)


def weights(rows: int = 48, width: int = 64, seed: int = 0) -> Tensor:
    """A random weight [rows, width]."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def fp8(weight: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[ScaledWeight, Tensor]:
    """fp8 codes with one scale, and the dequantized weight."""
    scale = weight.abs().max() / torch.finfo(dtype).max
    codes = (weight / scale).to(dtype)
    return ScaledWeight(codes, scale), codes.float() * scale


def int8(weight: Tensor) -> tuple[ScaledWeight, Tensor]:
    """Codes -127..127 with a scale for each row, and the dequantized weight."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    return ScaledWeight(codes, scale), codes.float() * scale


def gguf(weight: Tensor, kind: str = "Q4_0") -> tuple[GGUFWeight, Tensor]:
    """The gguf package's bytes and its dequantized weight."""
    data = quantize_gguf(weight.numpy(), kind)
    values = quants.dequantize(data, GGMLQuantizationType[kind])
    return GGUFWeight(torch.from_numpy(data), kind), torch.from_numpy(values)


def nf4(weight: Tensor, block: int = 64) -> tuple[FourBitWeight, Tensor]:
    """The nearest level of each element over its block's absmax, and the dequantized weight."""
    code = torch.tensor(NF4)
    flat = weight.reshape(-1)
    padded = torch.cat([flat, torch.zeros(-len(flat) % block)]).view(-1, block)
    absmax = padded.abs().amax(dim=1)
    indices = ((padded / absmax[:, None])[..., None] - code).abs().argmin(-1)
    values = (code[indices] * absmax[:, None]).view(-1)[: len(flat)].view(weight.shape)
    pairs = indices.view(-1)[: len(flat)].view(-1, 2).to(torch.uint8)
    packed = (pairs[:, 0] << 4 | pairs[:, 1])[:, None]
    return FourBitWeight(packed, absmax, code, tuple(weight.shape), block), values


def nested_nf4(weight: Tensor) -> tuple[FourBitWeight, Tensor]:
    """NF4 with quantized block scales: groups of eight here, of 256 in files."""
    plain, _ = nf4(weight)
    offset = plain.absmax.mean()
    levels = torch.linspace(-1, 1, 256)
    count = len(plain.absmax)
    grouped = torch.cat([plain.absmax - offset, torch.zeros(-count % 8)]).view(-1, 8)
    units = grouped.abs().amax(dim=1)
    codes = ((grouped / units[:, None])[..., None] - levels).abs().argmin(-1)
    scales = (levels[codes] * units[:, None] + offset).view(-1)[:count]
    halves = torch.cat([plain.packed >> 4, plain.packed & 15], dim=1).view(-1)
    spread = scales.repeat_interleave(64)[: len(halves)]
    values = (plain.levels[halves.long()] * spread).view(weight.shape)
    scale_codes = codes.view(-1)[:count].to(torch.uint8)
    shape = tuple(weight.shape)
    nested = NestedScales(scale_codes, levels, units, 8, offset)
    return FourBitWeight(plain.packed, nested, plain.levels, shape, 64), values


def every_format() -> dict[str, tuple[QuantizedWeight, Tensor]]:
    """Format -> a quantized weight [48, 64], and the dequantized weight in float32."""
    weight = weights()
    bf16, half = weight.bfloat16(), weight.half()
    e5m2 = weight.to(torch.float8_e5m2)
    parts = [gguf(weight[:16], "Q8_0"), fp8(weight[16:32]), (DenseWeight(bf16[32:]), bf16[32:].float())]
    return {
        "bf16": (DenseWeight(bf16), bf16.float()),
        "fp16": (DenseWeight(half), half.float()),
        "fp8 e5m2": (DenseWeight(e5m2), e5m2.float()),
        "fp8 e4m3fn scaled": fp8(weight),
        "int8 scaled": int8(weight),
        "GGUF Q4_0": gguf(weight),
        "GGUF Q5_1": gguf(weight, "Q5_1"),
        "bitsandbytes NF4": nf4(weight),
        "nested NF4": nested_nf4(weight),
        "joined": (ConcatenatedWeight(tuple(p for p, _ in parts)), torch.cat([n for _, n in parts])),
    }
