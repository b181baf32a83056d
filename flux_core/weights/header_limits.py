"""Limits on the names and shapes in a file's header."""

from __future__ import annotations

from collections.abc import Sequence

from .messages import quoted

MAX_NAME = 300
"""Characters of a tensor's name; the longest of FLUX.1's and of its LoRAs have 120."""

MAX_DIMS = 8
MAX_QUOTED = 100
"""Characters of a name from a file that an error repeats."""


def check_entry(file: str, name: str, shape: Sequence[int]) -> None:
    """Raise ValueError, one sentence, for a tensor that no model has."""
    if len(name) > MAX_NAME or not name.isprintable():
        raise ValueError(
            f"{file} holds a tensor named {quoted(name, MAX_QUOTED)}, a name has at most {MAX_NAME} "
            f"printable characters, this one {len(name):,}; choose another file"
        )
    if len(shape) > MAX_DIMS:
        raise ValueError(
            f"{file}: {name} has {len(shape):,} dimensions, at most {MAX_DIMS} are supported; "
            "choose another file"
        )
