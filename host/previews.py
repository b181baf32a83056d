"""Previews in the temp folder: deleted at the next start, but not those of another editor that still runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from . import unfinished

MARKER = "running"
"""Name of the file that an editor holds locked; unfinished.py deletes those of editors that were killed."""


@contextmanager
def owned(temp: Path) -> Iterator[None]:
    """Delete the previews of ended editors; while the block runs, other editors leave the new ones alone.

    Several editors may share a folder: each holds a locked marker from its start to its end, and previews
    older than every marker belong to none of them. On a read-only disk nothing changes.
    """
    try:
        marker, file = unfinished.create(temp / MARKER)
    except OSError:
        yield
        return
    try:
        _delete_before(_first_start(temp), temp)
        yield
    finally:
        file.close()
        with suppress(OSError):  # deleted by another editor that starts just now
            marker.unlink()


def _first_start(temp: Path) -> int:
    """When the first of the running editors started, in nanoseconds of the file system's clock."""
    unfinished.sweep(temp)
    starts = []
    for marker in temp.glob(f".{MARKER}.*.part"):
        with suppress(OSError):  # its editor ended just now
            starts.append(marker.stat().st_mtime_ns)
    return min(starts)


def _delete_before(start: int, temp: Path) -> None:
    for preview in temp.glob("preview_*.png"):
        with suppress(OSError):  # of another user
            if preview.stat().st_mtime_ns < start:
                preview.unlink()
