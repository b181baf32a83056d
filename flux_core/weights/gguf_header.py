"""Validates a GGUF file's header before anything else reads it, without storing its values.

The format is ggml's (docs/gguf.md in ggml-org/ggml): magic, version, two counts, keys with typed values,
tensors by name, shape, type and offset; then, from the next multiple of the alignment, their data. Every
count, length and offset is checked against the file's size, so that a reader can trust them afterwards.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ..quant.gguf import BLOCK_TYPES
from .header_limits import MAX_NAME
from .messages import quoted

SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by the code of its type."""

STRING, ARRAY, UINT32 = 8, 9, 4
MAX_ENTRIES = 100_000
"""Limit on the keys and on the tensors of a header: ten times as many as the largest models have."""

MAX_VALUES = 4_000_000
"""Limit on the values in all arrays of a header together: eight large vocabularies."""

MAX_DIMS = 4


@dataclass(frozen=True)
class Extent:
    """Where a tensor's bytes are, from the file's start."""

    name: str
    start: int
    stop: int


class _Damage(Exception):
    """A defect of the header; its text goes into the error's parentheses."""


class _Cut(Exception):
    """The header extends beyond the end of the file."""


class _Cursor:
    """A position in the mapped file, advanced by each read."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def skip(self, count: int) -> int:
        """Advance by `count` bytes and return the start; raises `_Cut` beyond the end."""
        start = self.at
        if count > len(self.data) - start:
            raise _Cut
        self.at = start + count
        return start

    def integer(self, layout: str) -> int:
        return struct.unpack_from(layout, self.data, self.skip(struct.calcsize(layout)))[0]

    def text(self) -> str:
        length = self.integer("<Q")
        start = self.skip(length)
        try:
            return self.data[start : self.at].decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Damage("a name is not UTF-8") from error


def check_gguf(path: Path) -> list[Extent]:
    """The extents of a GGUF file's tensors, in the file's order, when its header can be trusted.

    Raises ValueError, one sentence with the file's name, for every other.
    """
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            extents = _walk(_Cursor(data), size)
        except _Cut as error:
            message = (
                f"{path.name} is cut short: its header extends beyond its {size:,} bytes; download it again"
            )
            raise ValueError(message) from error
        except _Damage as error:
            raise ValueError(f"the header of {path.name} is damaged ({error}); download it again") from error
        except _Unsupported as error:
            raise ValueError(f"{path.name} {error}") from error
    needed = max((extent.stop for extent in extents), default=0)
    if needed > size:
        raise ValueError(f"{path.name} is cut short: it has {size:,} of {needed:,} bytes; download it again")
    return extents


class _Unsupported(Exception):
    """A valid file that is not supported; its text completes the sentence."""


def _walk(cursor: _Cursor, size: int) -> list[Extent]:
    cursor.skip(4)
    version = cursor.integer("<I")
    if version in (2 << 24, 3 << 24):
        raise _Unsupported(
            f"is GGUF version {version}, {version >> 24} in big-endian order; choose a usual file"
        )
    if version not in (2, 3):
        raise _Unsupported(f"is GGUF version {version}, only 2 and 3 are supported; choose a newer file")
    tensors, keys = cursor.integer("<Q"), cursor.integer("<Q")
    for what, count in (("tensors", tensors), ("keys", keys)):
        if count > MAX_ENTRIES:
            raise _Damage(f"it counts {count:,} {what}")
    alignment = _alignment(cursor, keys)
    described = [_tensor(cursor) for _ in range(tensors)]
    start = -(-cursor.at // alignment) * alignment
    return _placed(described, start, alignment, size)


def _alignment(cursor: _Cursor, keys: int) -> int:
    """The alignment, 32 unless a key gives it; moves the cursor past the keys."""
    alignment, values, seen = 32, 0, set()
    for _ in range(keys):
        key = cursor.text()
        if key in seen:
            raise _Damage(f"the key {key[:80]} appears twice")
        seen.add(key)
        kind = cursor.integer("<I")
        if key == "general.alignment":
            if kind != UINT32:
                raise _Damage("its alignment is not an integer")
            alignment = cursor.integer("<I")
            if alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
                raise _Damage(f"its alignment is {alignment:,}")
        else:
            values += _skip_value(cursor, kind, MAX_VALUES - values)
    return alignment


def _skip_value(cursor: _Cursor, kind: int, allowed: int) -> int:
    """Move past a value; returns the length of an array, which must be at most `allowed`."""
    if kind in SCALARS:
        cursor.skip(SCALARS[kind])
    elif kind == STRING:
        cursor.text()
    elif kind == ARRAY:
        inner, count = cursor.integer("<I"), cursor.integer("<Q")
        if count > allowed:
            raise _Damage(f"it holds an array of {count:,} values")
        if inner in SCALARS:
            cursor.skip(SCALARS[inner] * count)
        elif inner == STRING:
            for _ in range(count):
                cursor.text()
        else:
            raise _Damage(f"it holds an array of values of type {inner}")
        return count
    else:
        raise _Damage(f"it holds a value of type {kind}")
    return 0


def _tensor(cursor: _Cursor) -> tuple[str, int, int]:
    """A tensor's name, size in bytes and offset."""
    from gguf import GGMLQuantizationType

    name = cursor.text()
    if len(name) > MAX_NAME or not name.isprintable():
        raise _Damage(f"a tensor is named {quoted(name)}")
    dims = cursor.integer("<I")
    if not 1 <= dims <= MAX_DIMS:
        raise _Damage(f"{name[:80]} has {dims:,} dimensions")
    shape = [cursor.integer("<Q") for _ in range(dims)]
    code, offset = cursor.integer("<I"), cursor.integer("<Q")
    try:
        kind = GGMLQuantizationType(code).name
    except ValueError:
        kind = f"code {code}"
    if kind not in BLOCK_TYPES:
        raise _Unsupported(
            f"holds {name[:80]} as type {kind}, which is not supported; "
            f"choose one of {', '.join(BLOCK_TYPES)}"
        )
    block = BLOCK_TYPES[kind]
    count = prod(shape)
    if not count or count >= 1 << 62 or shape[0] % block.size:
        raise _Damage(f"{name[:80]} has shape {shape[::-1]}, which is impossible for {kind}")
    return name, count // block.size * block.bytes, offset


def _placed(described: list[tuple[str, int, int]], start: int, alignment: int, size: int) -> list[Extent]:
    """The tensors' extents after `start`, without repetition or overlap."""
    extents = []
    for name, count, offset in described:
        if offset % alignment:
            raise _Damage(f"{name[:80]} is not at a multiple of {alignment}")
        extents.append(Extent(name, start + offset, start + offset + count))
    if len({extent.name for extent in extents}) < len(extents):
        raise _Damage("a tensor name appears twice")
    in_order = sorted(extents, key=lambda extent: extent.start)
    for one, other in zip(in_order, in_order[1:], strict=False):
        if other.start < one.stop:
            raise _Damage(f"{other.name[:80]} overlaps {one.name[:80]}")
    return extents
