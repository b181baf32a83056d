"""Weights that are pages of a mapped file: read ahead of their use, returned to the system after it.

Linux evicts the least recently used pages. A model larger than memory is read in a cycle, so that the system
would always evict the pages that are needed next. Returning some blocks' pages right after their use keeps
the others' resident. Linux only: see its madvise(2).
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
"""Addresses [start, stop)."""

WILL_NEED, PAGE_OUT, POPULATE_READ = 3, 21, 22
"""Advice of Linux: read ahead (any version), reclaim (5.4), read in and map (5.14)."""


class DiskOffloader:
    """Reads the pages of offloaded weights in a thread of its own, and returns them to the system.

    Weights outside a mapped file never count as offloaded.
    """

    def __init__(self, offloaded: Iterable[Tensor]) -> None:
        files = mapped_files()
        self._addresses = {t.data_ptr() for t in offloaded if t.device.type == "cpu" and lies_in(files, t)}
        self._thread = ThreadPoolExecutor(1, "disk-offload")
        self._pending: tuple[nn.Module, Future[None]] | None = None

    def is_offloaded(self, part: nn.Module) -> bool:
        return any(self._is_offloaded(tensor) for tensor in weights_of(part))

    def prefetch(self, part: nn.Module) -> None:
        self._pending = part, self._thread.submit(_read, self._ranges(part))

    def wait(self, part: nn.Module) -> None:
        """Pages that were not prefetched are read as they are touched."""
        if self._pending is not None and self._pending[0] is part:
            self._pending[1].result()
            self._pending = None

    def evict(self, part: nn.Module) -> None:
        self._thread.submit(_page_out, self._ranges(part))

    def close(self) -> None:
        """Return once all reads and evictions are done; nothing can be prefetched any more."""
        self._thread.shutdown(wait=True)

    def _is_offloaded(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu" and tensor.data_ptr() in self._addresses

    def _ranges(self, part: nn.Module) -> list[Range]:
        """Where the part's offloaded weights lie; adjacent ranges are merged."""
        offloaded = [tensor for tensor in weights_of(part) if self._is_offloaded(tensor)]
        merged: list[Range] = []
        for start, stop in sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in offloaded):
            if merged and start - merged[-1][1] < mmap.PAGESIZE:
                merged[-1] = merged[-1][0], stop
            else:
                merged.append((start, stop))
        return merged


def mapped_files(maps: Path = Path("/proc/self/maps")) -> list[Range]:
    """The addresses at which this process has files mapped, ascending.

    Only their pages may be returned: they can be read again, and nothing is swapped.
    """
    ranges = []
    for line in maps.read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, _, _, _, inode, *path = line.split(maxsplit=5)
        if inode != "0" and path and path[0].startswith("/"):
            start, stop = (int(address, 16) for address in addresses.split("-"))
            ranges.append((start, stop))
    return sorted(ranges)


def lies_in(files: list[Range], tensor: Tensor) -> bool:
    """Whether all of a tensor's memory lies in one of the ranges."""
    start = tensor.data_ptr()
    index = bisect.bisect_right(files, (start, sys.maxsize)) - 1
    return tensor.nbytes > 0 and index >= 0 and start + tensor.nbytes <= files[index][1]


def _read(ranges: list[Range]) -> None:
    for start, stop in ranges:
        start -= start % mmap.PAGESIZE
        if not _advise(start, stop, POPULATE_READ):
            _advise(start, stop, WILL_NEED)


def _page_out(ranges: list[Range]) -> None:
    """Whole pages only: a neighbour may need the rest of those at the ends."""
    for start, stop in ranges:
        start, stop = start + -start % mmap.PAGESIZE, stop - stop % mmap.PAGESIZE
        if start < stop:
            _advise(start, stop, PAGE_OUT)


def _advise(start: int, stop: int, advice: int) -> bool:
    """Whether the system accepted the advice; an older one may not know it."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise(start, stop - start, advice) == 0
