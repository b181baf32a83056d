"""The forms that files keep weights in, and how each becomes numbers.

A `QuantizedWeight` is a weight in one of them. The tensors inside may be the mapped file itself: holding one
copies nothing, and each `dequantize` makes the values of one weight.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .gguf import BLOCK_TYPES, dequantize

SLICE = 1 << 20
"""Numbers that are unpacked at a time: what is made on the way stays small, and in the processor's cache."""

DTYPE_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8 e4m3fn",
    torch.float8_e5m2: "fp8 e5m2",
    torch.int8: "int8",
}
"""How the dtypes that files hold are called."""


FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@functools.cache
def has_fp8(device: torch.device) -> bool:
    """Whether a device can hold fp8 at all; Apple's cannot."""
    try:
        torch.empty(1, dtype=FP8[0]).to(device)
    except (RuntimeError, TypeError, AssertionError):  # the last where there is no such device at all
        return False
    return True


@dataclass(frozen=True)
class QuantizedWeight(ABC):
    """A weight as its file has it: tensors, and how they become numbers."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Shape of the numbers."""

    @property
    @abstractmethod
    def label(self) -> str:
        """The format's name: "bf16", "fp8 e4m3fn scaled", "GGUF Q4_K", ..."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The numbers, rounded once, from float32 to `dtype`."""

    def tensors(self) -> dict[str, Tensor]:
        """What is kept, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """The same weight with its tensors elsewhere."""
        return replace(self, **tensors)

    def to(self, device: torch.device) -> QuantizedWeight:
        """The same weight with its tensors on a device."""
        kept = self.fit_for(device)
        if kept.device == device:
            return kept
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in kept.tensors().items()}
        return kept.with_tensors(moved)

    def fit_for(self, device: torch.device) -> QuantizedWeight:
        """The same weight, where it is, in a form that a device can hold."""
        return self if has_fp8(device) else fp8_as_bytes(self)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """The weight's rows from `start` up to before `stop`."""
        return DenseWeight(self.dequantize(torch.float32)[start:stop])

    def numel(self) -> int:
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors().values())).device


def _in_slices(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, make: Callable[[int, int], Tensor]
) -> Tensor:
    """Rows of `shape` in `dtype`, of float32 rows that `make(start, stop)` makes a few at a time."""
    result = torch.empty(shape, dtype=dtype, device=device)
    height = shape[0] if shape else 1
    step = max(1, SLICE * height // max(1, shape.numel()))
    for start in range(0, height, step):
        result[start : start + step] = make(start, min(height, start + step))
    return result


def _floats(codes: Tensor) -> Tensor:
    """Codes as float32. On a CPU a table of all 256 fp8 numbers is twice as fast as torch's conversion."""
    if codes.device.type != "cpu" or codes.dtype not in FP8:
        return codes.float()
    return _looked_up(_table(codes.dtype), codes.view(torch.uint8))


def _table(dtype: torch.dtype) -> Tensor:
    """All numbers [256] of a dtype of 8 bits, float32 on the CPU."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


def _looked_up(table: Tensor, codes: Tensor) -> Tensor:
    """The numbers of a table that bytes of any shape stand for."""
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


@dataclass(frozen=True)
class DenseWeight(QuantizedWeight):
    """Floating-point numbers of any dtype, fp8 among them, computed in another."""

    values: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def label(self) -> str:
        return DTYPE_NAMES.get(self.values.dtype, str(self.values.dtype))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        if self.values.itemsize > 1 or not self.values.ndim:
            return self.values.to(dtype)
        return _in_slices(self.shape, dtype, self.device, lambda a, b: _floats(self.values[a:b]))

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        return DenseWeight(self.values[start:stop])


@dataclass(frozen=True)
class ScaledWeight(QuantizedWeight):
    """Codes (fp8 or int8) [out, in] times a float32 scale: one for all, or [out, 1]."""

    codes: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def label(self) -> str:
        return f"{DTYPE_NAMES.get(self.codes.dtype, self.codes.dtype)} scaled"

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        def make(start: int, stop: int) -> Tensor:
            return self._numbers(start, stop) * self._scale(start, stop)

        return _in_slices(self.shape, dtype, self.device, make)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        return replace(self, codes=self.codes[start:stop], scale=self._scale(start, stop))

    def _numbers(self, start: int, stop: int) -> Tensor:
        """What the codes of some rows stand for, float32."""
        return _floats(self.codes[start:stop])

    def _scale(self, start: int, stop: int) -> Tensor:
        return self.scale if self.scale.ndim == 0 else self.scale[start:stop]


@dataclass(frozen=True)
class LookupWeight(ScaledWeight):
    """fp8 for devices that have no such dtype: codes are bytes, numbers in a table [256]; under its label."""

    table: Tensor
    name: str

    @property
    def label(self) -> str:
        return self.name

    def _numbers(self, start: int, stop: int) -> Tensor:
        return _looked_up(self.table, self.codes[start:stop])


def fp8_as_bytes(stored: QuantizedWeight) -> QuantizedWeight:
    """The same weight without a tensor in fp8. Nothing is copied."""
    if isinstance(stored, ConcatenatedWeight):
        return ConcatenatedWeight(tuple(fp8_as_bytes(part) for part in stored.parts))
    if isinstance(stored, DenseWeight) and stored.values.dtype in FP8:
        codes, scale = stored.values, torch.ones((), device=stored.device)
    elif isinstance(stored, ScaledWeight) and stored.codes.dtype in FP8:
        codes, scale = stored.codes, stored.scale
    else:
        return stored
    return LookupWeight(codes.view(torch.uint8), scale, _table(codes.dtype).to(codes.device), stored.label)


@dataclass(frozen=True)
class GGUFWeight(QuantizedWeight):
    """Packed bytes [out, bytes a row] of a GGUF type."""

    packed: Tensor
    kind: str

    @property
    def shape(self) -> torch.Size:
        block = BLOCK_TYPES[self.kind]
        *rest, width = self.packed.shape
        return torch.Size([*rest, width // block.bytes * block.size])

    @property
    def label(self) -> str:
        return f"GGUF {self.kind}"

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        if self.packed.ndim < 2:
            return dequantize(self.packed, self.kind).to(dtype)

        def make(start: int, stop: int) -> Tensor:
            return dequantize(self.packed[start:stop], self.kind)

        return _in_slices(self.shape, dtype, self.device, make)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        return GGUFWeight(self.packed[start:stop], self.kind)


@dataclass(frozen=True)
class FourBitWeight(QuantizedWeight):
    """bitsandbytes' 4-bit codes (NF4, FP4), two a byte, the first in the high half, blocks over flat numbers.

    A block's scale is `absmax` itself; or, where scales are quantised too, the byte `absmax` numbers a level
    of `nested_code`, in units of `nested_absmax` (one for every `nested_block` scales), above `offset`.
    Layout: bitsandbytes/backends/default/ops.py, _dequantize_4bit_impl and _gemm_4bit_default_impl.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    size: tuple[int, ...]
    block: int
    name: str = "nf4"
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    nested_block: int = 256
    offset: Tensor | None = None

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
            numbers = torch.stack([packed >> 4, packed & 15], dim=-1).view(-1)[: stop - start]
            blocks = scales[start // self.block : -(-stop // self.block)]
            spread = blocks.repeat_interleave(self.block)[: stop - start]
            result[start:stop] = self.code[numbers.int()] * spread
        return result.view(self.size)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """As they are where they begin and end with a block, else as numbers."""
        width = self.numel() // self.size[0]
        first, last = start * width, stop * width
        if first % self.block or (last % self.block and last != self.numel()):
            return super().rows(start, stop)
        packed = self.packed.view(-1)[first // 2 : (last + 1) // 2]
        scales = self._scales()[first // self.block : -(-last // self.block)]
        return FourBitWeight(packed, scales, self.code, (stop - start, *self.size[1:]), self.block, self.name)

    def _scales(self) -> Tensor:
        """A float32 scale for every block."""
        if self.nested_absmax is None or self.nested_code is None:
            return self.absmax
        units = self.nested_absmax.repeat_interleave(self.nested_block)[: self.absmax.numel()]
        scales = self.nested_code[self.absmax.int()] * units
        return scales if self.offset is None else scales + self.offset


@dataclass(frozen=True)
class ConcatenatedWeight(QuantizedWeight):
    """Weights one below the other, for files that keep q, k and v apart: each part in a form of its own."""

    parts: tuple[QuantizedWeight, ...]

    @property
    def shape(self) -> torch.Size:
        first = self.parts[0].shape
        return torch.Size([sum(part.shape[0] for part in self.parts), *first[1:]])

    @property
    def label(self) -> str:
        return max(self.parts, key=lambda part: part.numel()).label

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}_{n}": t for i, part in enumerate(self.parts) for n, t in part.tensors().items()}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        moved = [
            part.with_tensors({name: tensors[f"{i}_{name}"] for name in part.tensors()})
            for i, part in enumerate(self.parts)
        ]
        return ConcatenatedWeight(tuple(moved))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        result = torch.empty(self.shape, dtype=dtype, device=self.device)
        for part, rows in zip(self.parts, result.split([p.shape[0] for p in self.parts]), strict=True):
            rows.copy_(part.dequantize(dtype))
        return result
