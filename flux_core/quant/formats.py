"""Weights in the formats that files store them in, and how each is dequantized.

A `QuantizedWeight` holds the file's tensors, which may be memory-mapped: constructing one copies nothing, and
`dequantize` computes the values of this one weight. 4-bit formats of bitsandbytes are in four_bit.py.
"""

from __future__ import annotations

import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .gguf import BLOCK_TYPES, dequantize

SLICE = 1 << 20
"""Elements that are dequantized at a time: intermediate tensors stay small and in the CPU's cache."""

DTYPE_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8 e4m3fn",
    torch.float8_e5m2: "fp8 e5m2",
    torch.int8: "int8",
}
"""Display names of the dtypes that files contain."""

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@functools.cache
def has_fp8(device: torch.device) -> bool:
    """Whether a device supports fp8 tensors at all; Apple's do not."""
    try:
        torch.empty(1, dtype=FP8[0]).to(device)
    except (RuntimeError, TypeError, AssertionError):  # AssertionError if the device is missing
        return False
    return True


class QuantizedWeight(nn.Module, ABC):
    """A weight as its file stores it: tensors, which are buffers, and settings.

    Subclasses pass the arguments of their constructor on by name. Tensors may be None; an argument may be
    another `QuantizedWeight` or an `nn.ModuleList` of them.
    """

    description: str
    """The class and its arguments but the tensors, as JSON: `operator.rebuild` reads it."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self._names = tuple(arguments)
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self.description = json.dumps(_described(self))

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Shape of the dequantized weight."""

    @property
    @abstractmethod
    def label(self) -> str:
        """The format's name: "bf16", "fp8 e4m3fn scaled", "GGUF Q4_K", ..."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The values in `dtype`, rounded once from float32. May share memory with the weight's tensors."""

    def without_fp8(self) -> QuantizedWeight:
        """The same weight without fp8 tensors, for devices that lack the dtype. Copies nothing."""
        return self

    def moved_to(self, device: torch.device) -> QuantizedWeight:
        """The same weight with its tensors on a device, without fp8 if the device does not support it."""
        weight = self if has_fp8(device) else self.without_fp8()
        if weight.device == device:
            return weight
        asynchronous = device.type != "cpu"  # the CPU could read the copy before it is complete
        return weight.with_tensors(lambda tensor: tensor.to(device, non_blocking=asynchronous))

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """The weight's rows [start:stop]; dequantized to float32 if the format cannot be split there."""
        return DenseWeight(self.dequantize(torch.float32)[start:stop])

    def arguments(self) -> dict[str, Any]:
        """What the constructor received, or what has been put in its place since."""
        return {name: getattr(self, name) for name in self._names}

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of the arguments."""
        return _tensors_of(self)

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> QuantizedWeight:
        """The same weight with `change` applied to each tensor."""
        return type(self)(**{name: _changed(value, change) for name, value in self.arguments().items()})

    def numel(self) -> int:
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized weight."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def device(self) -> torch.device:
        return self.tensors()[0].device

    def extra_repr(self) -> str:
        return f"{[*self.shape]}, {self.label}"


def _tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, QuantizedWeight):
        return [tensor for name in value._names for tensor in _tensors_of(getattr(value, name))]
    if isinstance(value, nn.ModuleList):
        return [tensor for part in value for tensor in _tensors_of(part)]
    return []


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, QuantizedWeight):
        return value.with_tensors(change)
    return [_changed(part, change) for part in value] if isinstance(value, nn.ModuleList) else value


def _described(value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        return ["tensor"]
    if isinstance(value, QuantizedWeight):
        return ["weight", type(value).__name__, {k: _described(v) for k, v in value.arguments().items()}]
    if isinstance(value, nn.ModuleList):
        return ["parts", [_described(part) for part in value]]
    return ["value", value]


def _by_rows(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, rows: Callable[[int, int], Tensor]
) -> Tensor:
    """A tensor of `shape` in `dtype`, filled with what `rows(start, stop)` returns, a few rows at a time."""
    result = torch.empty(shape, dtype=dtype, device=device)
    height = shape[0] if shape else 1
    step = max(1, SLICE * height // max(1, shape.numel()))
    for start in range(0, height, step):
        result[start : start + step] = rows(start, min(height, start + step))
    return result


def _to_float32(codes: Tensor) -> Tensor:
    """Codes as float32. On a CPU, a table of all 256 fp8 values is twice as fast as torch's conversion."""
    if codes.device.type != "cpu" or codes.dtype not in FP8:
        return codes.float()
    return _look_up(_table(codes.dtype), codes.view(torch.uint8))


def _table(dtype: torch.dtype) -> Tensor:
    """All values [256] of an 8-bit dtype, float32 on the CPU."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


def _look_up(table: Tensor, codes: Tensor) -> Tensor:
    """The table's values at uint8 codes of any shape."""
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


class DenseWeight(QuantizedWeight):
    """Floating-point values of any dtype, unscaled fp8 included."""

    values: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__(values=values)

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def label(self) -> str:
        return DTYPE_NAMES.get(self.values.dtype, str(self.values.dtype))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        if self.values.itemsize > 1 or not self.values.ndim:
            return self.values.to(dtype)
        return _by_rows(self.shape, dtype, self.device, lambda a, b: _to_float32(self.values[a:b]))

    def without_fp8(self) -> QuantizedWeight:
        if self.values.dtype not in FP8:
            return self
        return _lookup(self.values, torch.ones((), device=self.device), self.label)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        return DenseWeight(self.values[start:stop])


class ScaledWeight(QuantizedWeight):
    """fp8 or int8 codes [out, in] times a float32 scale: one for the whole weight, or [out, 1]."""

    codes: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, **settings: Any) -> None:
        super().__init__(codes=codes, scale=scale, **settings)

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def label(self) -> str:
        return f"{DTYPE_NAMES.get(self.codes.dtype, self.codes.dtype)} scaled"

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        def rows(start: int, stop: int) -> Tensor:
            return self._unscaled(start, stop) * self._scale(start, stop)

        return _by_rows(self.shape, dtype, self.device, rows)

    def without_fp8(self) -> QuantizedWeight:
        return _lookup(self.codes, self.scale, self.label) if self.codes.dtype in FP8 else self

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        cut = {"codes": self.codes[start:stop], "scale": self._scale(start, stop)}
        return type(self)(**(self.arguments() | cut))

    def _unscaled(self, start: int, stop: int) -> Tensor:
        """The codes of some rows as float32."""
        return _to_float32(self.codes[start:stop])

    def _scale(self, start: int, stop: int) -> Tensor:
        return self.scale if self.scale.ndim == 0 else self.scale[start:stop]


class LookupWeight(ScaledWeight):
    """A `ScaledWeight` with uint8 codes that index a table [256] of values, float32.

    It represents fp8 on devices without that dtype; `name` is the label of the fp8 weight.
    """

    table: Tensor
    name: str

    def __init__(self, codes: Tensor, scale: Tensor, table: Tensor, name: str) -> None:
        super().__init__(codes, scale, table=table, name=name)

    @property
    def label(self) -> str:
        return self.name

    def _unscaled(self, start: int, stop: int) -> Tensor:
        return _look_up(self.table, self.codes[start:stop])


def _lookup(codes: Tensor, scale: Tensor, name: str) -> LookupWeight:
    return LookupWeight(codes.view(torch.uint8), scale, _table(codes.dtype).to(codes.device), name)


class GGUFWeight(QuantizedWeight):
    """Packed blocks [out, bytes per row], uint8, of the GGUF type `kind`."""

    packed: Tensor
    kind: str

    def __init__(self, packed: Tensor, kind: str) -> None:
        super().__init__(packed=packed, kind=kind)

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

        def rows(start: int, stop: int) -> Tensor:
            return dequantize(self.packed[start:stop], self.kind)

        return _by_rows(self.shape, dtype, self.device, rows)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        return GGUFWeight(self.packed[start:stop], self.kind)


class ConcatenatedWeight(QuantizedWeight):
    """Weights concatenated along their rows, each in its own format: q, k and v of files that split them."""

    parts: Sequence[QuantizedWeight]

    def __init__(self, parts: Sequence[QuantizedWeight]) -> None:
        super().__init__(parts=nn.ModuleList(parts))

    @property
    def shape(self) -> torch.Size:
        first = self.parts[0].shape
        return torch.Size([sum(part.shape[0] for part in self.parts), *first[1:]])

    @property
    def label(self) -> str:
        return max(self.parts, key=lambda part: part.numel()).label

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        result = torch.empty(self.shape, dtype=dtype, device=self.device)
        for part, rows in zip(self.parts, result.split([p.shape[0] for p in self.parts]), strict=True):
            rows.copy_(part.dequantize(dtype))
        return result

    def without_fp8(self) -> QuantizedWeight:
        return ConcatenatedWeight([part.without_fp8() for part in self.parts])
