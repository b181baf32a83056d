"""Activations of the autoencoder by rows: stored, recomputed when read, or overwritten while being read.

All have one image, [1, C, H, W], channels last in memory, so that a strip of rows is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.autoencoder import Downsample, Upsample

HALO = 2
"""Rows above those being overwritten whose old values remain readable: two convolutions need them."""

Rows = Callable[[int, int], Tensor]
"""(first, last) -> rows first to last - 1 of an activation, [1, C, last - first, W]."""


class RowSource(Protocol):
    """An activation of shape [1, C, H, W] whose rows can be read; it holds `nbytes` of memory."""

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def nbytes(self) -> int: ...

    def rows(self, first: int, last: int) -> Tensor: ...

    def compact(self) -> None: ...


class RowBuffer:
    """An activation in memory, uninitialized at first.

    A compact one stores float32 as int16 with a scale for each row of each channel: the error is at most
    2^-16 of the largest value there. Narrower dtypes are stored as they are.
    """

    def __init__(self, shape: tuple[int, int, int], like: Tensor, compact: bool = False) -> None:
        channels, height, width = self.shape = shape
        self.dtype, self._device = like.dtype, like.device
        self._scales: Tensor | None = None
        dtype = self.dtype
        if compact and self.dtype == torch.float32:
            dtype = torch.int16
            self._scales = torch.ones(1, channels, height, 1, device=like.device)
        # a view of [H, W, C]: where a side is 1, torch.empty in channels_last counts as contiguous
        self._data = torch.empty(1, height, width, channels, dtype=dtype, device=like.device).permute(
            0, 3, 1, 2
        )
        self._top, self._old = 0, self._data[:, :, :0]

    @classmethod
    def of(cls, whole: Tensor) -> RowBuffer:
        """A whole activation [1, C, H, W], which may be overwritten from now on."""
        buffer = cls.__new__(cls)
        buffer.shape, buffer.dtype = (whole.shape[1], whole.shape[2], whole.shape[3]), whole.dtype
        buffer._device, buffer._scales = whole.device, None
        buffer._data = whole.contiguous(memory_format=torch.channels_last)
        buffer._top, buffer._old = 0, buffer._data[:, :, :0]
        return buffer

    @property
    def nbytes(self) -> int:
        return self._data.nbytes

    def rows(self, first: int, last: int) -> Tensor:
        """Rows as they were before `overwrite` started: of the overwritten ones, only the last HALO."""
        if first >= self._top:
            return self._read(first, last)
        old = self._old[:, :, self._old.shape[2] - (self._top - first) :]
        return torch.cat([old, self._read(self._top, last)], dim=2)

    def fill(self, first: int, rows: Tensor) -> None:
        """Write rows whose old values are not needed."""
        target = self._data[:, :, first : first + rows.shape[2]]
        if self._scales is None:
            target.copy_(rows)
            return
        largest = rows.abs().amax(3, keepdim=True)
        scales = torch.where(largest == 0, 1.0, largest / torch.iinfo(torch.int16).max)
        self._scales[:, :, first : first + rows.shape[2]] = scales
        target.copy_((rows / scales).round_())

    def overwrite(self, first: int, rows: Tensor) -> None:
        """Write the next rows from the top, while old values are still read."""
        last = first + rows.shape[2]
        self._old = self._read(max(first, last - HALO), last).clone()
        self._top = last
        self.fill(first, rows)
        if last == self.shape[1]:
            self._top, self._old = 0, self._data[:, :, :0]

    def compact(self) -> None:
        """Store 16 bits per value from now on."""
        if self._data.dtype == torch.float32:
            small = RowBuffer(self.shape, self._data, compact=True)
            for first in range(0, self.shape[1], 16):
                small.fill(first, self._data[:, :, first : first + 16])
            self._data, self._scales, self._old = small._data, small._scales, small._old

    def whole(self) -> Tensor:
        """All rows, [1, C, H, W]."""
        return self._read(0, self.shape[1])

    def _read(self, first: int, last: int) -> Tensor:
        part = self._data[:, :, first:last]
        return part if self._scales is None else part.float().mul_(self._scales[:, :, first:last])


class UpsampledRows:
    """The output of an Upsample of a buffer, recomputed whenever rows are read."""

    def __init__(self, source: RowBuffer, layer: Upsample) -> None:
        self._source, self._layer = source, layer
        channels, height, width = source.shape
        self.shape = (channels, 2 * height, 2 * width)

    @property
    def nbytes(self) -> int:
        return self._source.nbytes

    def compact(self) -> None:
        self._source.compact()

    def rows(self, first: int, last: int) -> Tensor:
        low, high = first // 2, (last + 1) // 2
        part = pad_rows(self._source.rows, self._source.shape[1], low - 1, high + 1)
        return self._layer(part, padding=0)[:, :, first - 2 * low : last - 2 * low]


def pad_rows(rows: Rows, height: int, first: int, last: int) -> Tensor:
    """Rows first to last - 1 of an activation of `height` rows, zeros outside it."""
    part = rows(max(first, 0), min(last, height))
    above, below = max(-first, 0), max(last - height, 0)
    return F.pad(part, (0, 0, above, below)) if above or below else part


def convolve_rows(conv: nn.Conv2d, rows: Rows, height: int, first: int, last: int) -> Tensor:
    """Rows first to last - 1 of the output of a 3x3 convolution."""
    return F.conv2d(pad_rows(rows, height, first - 1, last + 1), conv.weight, conv.bias, padding=(0, 1))


def downsample_rows(layer: Downsample, source: RowSource, first: int, last: int) -> Tensor:
    """Rows first to last - 1 of the output of a Downsample."""
    part = pad_rows(source.rows, source.shape[1], 2 * first, 2 * last + 1)
    return layer.conv(F.pad(part, (0, 1, 0, 0)))
