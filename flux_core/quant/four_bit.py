"""bitsandbytes' 4-bit formats, NF4 and FP4.

Layout: bitsandbytes/backends/default/ops.py, _dequantize_4bit_impl and _gemm_4bit_default_impl.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from .formats import SLICE, QuantizedWeight

MAX_BLOCK = 4096
"""Elements of the largest block that bitsandbytes writes."""


class NestedScales(QuantizedWeight):
    """Block scales that are quantized themselves ("double quantization"): [blocks], float32.

    A uint8 code indexes `levels` [256]; the level is multiplied by the element of `absmax` of its group of
    `group` scales, then `offset` is added.
    """

    codes: Tensor
    levels: Tensor
    absmax: Tensor
    group: int
    offset: Tensor | None

    def __init__(
        self, codes: Tensor, levels: Tensor, absmax: Tensor, group: int = 256, offset: Tensor | None = None
    ) -> None:
        super().__init__(codes=codes, levels=levels, absmax=absmax, group=group, offset=offset)
        _check(levels.shape == (256,) and 0 < group <= MAX_BLOCK)
        _check(absmax.shape == (-(-codes.numel() // group),))

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def label(self) -> str:
        return "nested scales"

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        units = self.absmax.repeat_interleave(self.group)[: self.codes.numel()]
        scales = self.levels[self.codes.int()] * units
        return (scales if self.offset is None else scales + self.offset).to(dtype)


class FourBitWeight(QuantizedWeight):
    """4-bit codes, two per byte, the first in the high bits, in blocks over the flattened weight of `size`.

    A code indexes `levels` [16]; the level is multiplied by its block's scale in `absmax`. Raises ValueError
    if the numbers of elements do not match.
    """

    packed: Tensor
    absmax: Tensor | NestedScales
    levels: Tensor
    size: tuple[int, ...]
    block: int
    name: str

    def __init__(
        self,
        packed: Tensor,
        absmax: Tensor | NestedScales,
        levels: Tensor,
        size: Sequence[int],
        block: int,
        name: str = "nf4",
    ) -> None:
        size = tuple(size)
        super().__init__(packed=packed, absmax=absmax, levels=levels, size=size, block=block, name=name)
        count = prod(size)  # as Python's int: a damaged file's may overflow torch's
        _check(min(size, default=0) > 0 and 0 < block <= MAX_BLOCK and block % 2 == 0)
        _check(levels.shape == (16,))
        _check(packed.numel() == -(-count // 2))
        _check((absmax.numel(), absmax.ndim if isinstance(absmax, Tensor) else 1) == (-(-count // block), 1))

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.size)

    @property
    def label(self) -> str:
        return f"bitsandbytes {self.name.upper()}"

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        scales = self._scales()
        result = torch.empty(self.numel(), dtype=dtype, device=self.device)
        step = SLICE // self.block * self.block or self.block
        for start in range(0, self.numel(), step):
            stop = min(self.numel(), start + step)
            packed = self.packed.view(-1)[start // 2 : (stop + 1) // 2]
            codes = torch.stack([packed >> 4, packed & 15], dim=-1).view(-1)[: stop - start]
            blocks = scales[start // self.block : -(-stop // self.block)]
            spread = blocks.repeat_interleave(self.block)[: stop - start]
            result[start:stop] = self.levels[codes.int()] * spread
        return result.view(self.size)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        width = self.numel() // self.size[0]
        first, last = start * width, stop * width
        if first % self.block or (last % self.block and last != self.numel()):
            return super().rows(start, stop)
        packed = self.packed.view(-1)[first // 2 : (last + 1) // 2]
        scales = self._scales()[first // self.block : -(-last // self.block)]
        size = (stop - start, *self.size[1:])
        return FourBitWeight(packed, scales, self.levels, size, self.block, self.name)

    def _scales(self) -> Tensor:
        """The scale of every block, float32."""
        return self.absmax if isinstance(self.absmax, Tensor) else self.absmax.dequantize(torch.float32)


def _check(fits: bool) -> None:
    if not fits:
        raise ValueError("the sizes of a 4-bit weight's codes, scales and levels must match its shape")
