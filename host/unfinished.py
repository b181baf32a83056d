"""The hidden files in which new contents are written, and locks between programs that share a folder.

A process that is killed while it writes leaves such a file behind; the next start deletes it. A file that a
running process still writes is locked, so that a second host on the same folder leaves it alone.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO

PART = re.compile(r"\..*\.[0-9a-f]{8}\.part")
"""Names of unfinished files: .NAME.1a2b3c4d.part."""
MAX_STEM = 30
"""Characters of a file's name that are repeated in its unfinished file's."""
MAX_SWEPT = 20_000
"""Folder entries that are looked at in one start; an output folder may lie in a large tree."""
MAX_WAIT = 10.0
"""Seconds until a lock that another program holds is given up."""


def create(path: Path) -> tuple[Path, IO[bytes]]:
    """A new, locked, hidden file beside `path`, and the file opened for writing. Raises OSError."""
    while True:
        part = path.parent / f".{path.name[:MAX_STEM]}.{secrets.token_hex(4)}.part"
        file = part.open("xb")
        if _try_lock(file) and os.fstat(file.fileno()).st_nlink:
            return part, file
        file.close()  # a host that starts just now deletes it


def sweep(folder: Path) -> None:
    """Delete the unfinished files in a folder and below it that no process writes any more."""
    for part in [path for path in islice(_entries(folder), MAX_SWEPT) if PART.fullmatch(path.name)]:
        with suppress(OSError):
            with part.open("ab") as file:
                is_abandoned = _try_lock(file, otherwise=False)
                if is_abandoned and os.name != "nt":
                    part.unlink()
            if is_abandoned and os.name == "nt":  # there an open file cannot be deleted
                part.unlink()


def _entries(folder: Path) -> Iterator[Path]:
    """Folders and files below a folder; links are followed, each folder is visited once."""
    visited: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        target = os.path.realpath(place)
        folders[:] = [] if target in visited else [name for name in folders if not name.startswith(".")]
        visited.add(target)
        yield from (Path(place, name) for name in (*files, *folders))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of `path`, a file that contains nothing else, against other threads and programs.

    Raises OSError, TimeoutError if another holds it for MAX_WAIT seconds.
    """
    deadline = time.monotonic() + MAX_WAIT
    with path.open("ab") as file:
        while not _try_lock(file):
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, "another program is writing it")
            time.sleep(0.01)
        yield


def _try_lock(file: IO[bytes], otherwise: bool = True) -> bool:
    """Whether the file is now locked; `otherwise` where the file system has no locks.

    The lock ends when the file is closed or the process ends.
    """
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return otherwise
    return True
