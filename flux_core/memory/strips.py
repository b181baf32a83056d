"""An activation of the autoencoder by its rows: kept, computed when read, or overwritten while it is read.

All are one picture's, [1, C, H, W], channels last in memory, so that a strip of rows is one piece of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.autoencoder import Downsample, Upsample

HALO = 2
"""Rows above those being overwritten that can still be read as they were: what two convolutions need."""

Rows = Callable[[int, int], Tensor]
"""(first, last + 1) -> these rows of an activation, [1, C, last - first, W]."""


class Source(Protocol):
    """An activation whose rows can be read, of shape [1, C, H, W]; `nbytes` of memory stand behind it."""

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def nbytes(self) -> int: ...

    def rows(self, first: int, last: int) -> Tensor: ...

    def compact(self) -> None: ...


class Stored:
    """An activation in memory, empty at first.

    Where it is compact, float32 is kept as int16 with a scale for each row of each channel: what is lost is
    at most 2^-16 of the largest value there. Narrower types stay as they are.
    """

    def __init__(self, shape: tuple[int, int, int], like: Tensor, compact: bool = False) -> None:
        channels, height, width = self.shape = shape
        self.dtype, self._device = like.dtype, like.device
        self._scales: Tensor | None = None
        kept = self.dtype
        if compact and self.dtype == torch.float32:
            kept = torch.int16
            self._scales = torch.ones(1, channels, height, 1, device=like.device)
        # a view of [H, W, C]: torch.empty in channels_last reads as contiguous where a side is 1
        self._data = torch.empty(1, height, width, channels, dtype=kept, device=like.device).permute(
            0, 3, 1, 2
        )
        self._top, self._old = 0, self._data[:, :, :0]

    @classmethod
    def of(cls, whole: Tensor) -> Stored:
        """A whole activation [1, C, H, W], which may be overwritten from now on."""
        stored = cls.__new__(cls)
        stored.shape, stored.dtype = (whole.shape[1], whole.shape[2], whole.shape[3]), whole.dtype
        stored._device, stored._scales = whole.device, None
        stored._data = whole.contiguous(memory_format=torch.channels_last)
        stored._top, stored._old = 0, stored._data[:, :, :0]
        return stored

    @property
    def nbytes(self) -> int:
        return self._data.nbytes

    def rows(self, first: int, last: int) -> Tensor:
        """Rows as they were before `overwrite` began: of those that it has passed only the last HALO."""
        if first >= self._top:
            return self._read(first, last)
        old = self._old[:, :, self._old.shape[2] - (self._top - first) :]
        return torch.cat([old, self._read(self._top, last)], dim=2)

    def fill(self, first: int, rows: Tensor) -> None:
        """Write rows that nobody has to read as they were."""
        place = self._data[:, :, first : first + rows.shape[2]]
        if self._scales is None:
            place.copy_(rows)
            return
        largest = rows.abs().amax(3, keepdim=True)
        scales = torch.where(largest == 0, 1.0, largest / torch.iinfo(torch.int16).max)
        self._scales[:, :, first : first + rows.shape[2]] = scales
        place.copy_((rows / scales).round_())

    def overwrite(self, first: int, rows: Tensor) -> None:
        """Write the next rows from the top, while the old ones are still read."""
        last = first + rows.shape[2]
        self._old = self._read(max(first, last - HALO), last).clone()
        self._top = last
        self.fill(first, rows)
        if last == self.shape[1]:
            self._top, self._old = 0, self._data[:, :, :0]

    def compact(self) -> None:
        """Keep 16 bits of each value from now on."""
        if self._data.dtype == torch.float32:
            small = Stored(self.shape, self._data, compact=True)
            for first in range(0, self.shape[1], 16):
                small.fill(first, self._data[:, :, first : first + 16])
            self._data, self._scales, self._old = small._data, small._scales, small._old

    def whole(self) -> Tensor:
        """All of it, [1, C, H, W]."""
        return self._read(0, self.shape[1])

    def _read(self, first: int, last: int) -> Tensor:
        part = self._data[:, :, first:last]
        return part if self._scales is None else part.float().mul_(self._scales[:, :, first:last])


class Upsampled:
    """What an Upsample makes of a kept activation, computed whenever rows are read."""

    def __init__(self, source: Stored, layer: Upsample) -> None:
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
        part = padded(self._source.rows, self._source.shape[1], low - 1, high + 1)
        return self._layer(part, padding=0)[:, :, first - 2 * low : last - 2 * low]


def padded(rows: Rows, height: int, first: int, last: int) -> Tensor:
    """Rows from first to last - 1 of an activation of `height` rows, zeros where there are none."""
    part = rows(max(first, 0), min(last, height))
    above, below = max(-first, 0), max(last - height, 0)
    return F.pad(part, (0, 0, above, below)) if above or below else part


def convolved(conv: nn.Conv2d, rows: Rows, height: int, first: int, last: int) -> Tensor:
    """Rows of what a 3x3 convolution makes of others."""
    return F.conv2d(padded(rows, height, first - 1, last + 1), conv.weight, conv.bias, padding=(0, 1))


def halved(layer: Downsample, source: Source, first: int, last: int) -> Tensor:
    """Rows of what a Downsample makes of an activation."""
    part = padded(source.rows, source.shape[1], 2 * first, 2 * last + 1)
    return layer.conv(F.pad(part, (0, 1, 0, 0)))
