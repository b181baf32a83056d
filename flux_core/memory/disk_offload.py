"""Weights that are pages of a mapped file: read ahead of use, and given back to the system after it.

The system drops the pages that were used longest ago. A model larger than the memory goes round and round, so
that it would always drop just what is needed next; where some blocks' pages are given back as soon as they
were used, the others' stay. Linux only: see its madvise(2).
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor, nn

from .streaming import weights_of

Range = tuple[int, int]
"""Addresses, from and before."""

WILL_NEED, PAGE_OUT, POPULATE_READ = 3, 21, 22
"""Advice of Linux: read ahead (any version), give back (5.4), read in and map (5.14)."""


class Pager:
    """Brings in the pages of far weights in a thread of its own, and gives them back.

    Weights that are no pages of a file are never far.
    """

    def __init__(self, far: Iterable[Tensor]) -> None:
        files = mapped_files()
        self._far = {t.data_ptr() for t in far if t.device.type == "cpu" and _lies_in(files, t)}
        self._thread = ThreadPoolExecutor(1, "pager")
        self._coming: tuple[nn.Module, Future[None]] | None = None

    def is_far(self, part: nn.Module) -> bool:
        return any(self._is_far(tensor) for tensor in weights_of(part))

    def start(self, part: nn.Module) -> None:
        self._coming = part, self._thread.submit(_bring, self._ranges(part))

    def finish(self, part: nn.Module) -> None:
        """Pages that nobody asked for come as they are touched."""
        if self._coming is not None and self._coming[0] is part:
            self._coming[1].result()
            self._coming = None

    def drop(self, part: nn.Module) -> None:
        self._thread.submit(_give_back, self._ranges(part))

    def _is_far(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu" and tensor.data_ptr() in self._far

    def _ranges(self, part: nn.Module) -> list[Range]:
        """Where the part's far weights lie, neighbours as one."""
        far = [tensor for tensor in weights_of(part) if self._is_far(tensor)]
        joined: list[Range] = []
        for start, stop in sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in far):
            if joined and start - joined[-1][1] < mmap.PAGESIZE:
                joined[-1] = joined[-1][0], stop
            else:
                joined.append((start, stop))
        return joined


def mapped_files(maps: Path = Path("/proc/self/maps")) -> list[Range]:
    """The addresses at which this process has files mapped, ascending.

    Only their pages are touched here: what is given back there is read again, and nothing is swapped.
    """
    ranges = []
    for line in maps.read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, _, _, _, inode, *path = line.split(maxsplit=5)
        if inode != "0" and path and path[0].startswith("/"):
            start, stop = (int(address, 16) for address in addresses.split("-"))
            ranges.append((start, stop))
    return sorted(ranges)


def _lies_in(files: list[Range], tensor: Tensor) -> bool:
    start = tensor.data_ptr()
    at = bisect.bisect_right(files, (start, sys.maxsize)) - 1
    return tensor.nbytes > 0 and at >= 0 and start + tensor.nbytes <= files[at][1]


def _bring(ranges: list[Range]) -> None:
    for start, stop in ranges:
        start -= start % mmap.PAGESIZE
        if not _advise(start, stop, POPULATE_READ):
            _advise(start, stop, WILL_NEED)


def _give_back(ranges: list[Range]) -> None:
    """Whole pages only: a neighbour may need the rest of those at the ends."""
    for start, stop in ranges:
        start, stop = start + -start % mmap.PAGESIZE, stop - stop % mmap.PAGESIZE
        if start < stop:
            _advise(start, stop, PAGE_OUT)


def _advise(start: int, stop: int, advice: int) -> bool:
    """Whether the system took the advice; an older one may not know it."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise(start, stop - start, advice) == 0
