"""Text for the terminal, whose encoding and state never change what a command does."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TextIO


def write(stream: TextIO | None, text: str) -> None:
    """Write to stdout or stderr at once; characters that its encoding lacks are escaped as in Python.

    Nothing is written where there is no stream. Raises OSError for a closed pipe or a full disk.
    """
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except OSError:
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is stream:
                setattr(sys, name, None)  # or Python would flush it again at exit and fail again
        raise


def report(text: str, stream: TextIO | None = None) -> None:
    """Write what a command reports beside its result, by default to stderr; drop it if that fails."""
    with suppress(OSError):
        write(stream or sys.stderr, text)
