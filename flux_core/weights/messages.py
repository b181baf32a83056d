"""Values in error messages: on one line, of bounded length, and with characters that can be encoded."""

from __future__ import annotations

from itertools import islice
from typing import Any


def quoted(value: Any, limit: int = 200) -> str:
    """A value for an error message: on one line, at most `limit` characters, without lone surrogates."""
    if isinstance(value, (str, bytes)):
        value = value[: limit + 1]
    elif isinstance(value, (list, tuple)):
        value = value[:limit]
    elif isinstance(value, dict):
        value = dict(islice(value.items(), limit))
    return one_line(repr(value), limit)


def one_line(text: str, limit: int = 200) -> str:
    """A text on one line, at most `limit` characters, without lone surrogates."""
    cut = " ".join(text[: 2 * limit].encode(errors="replace").decode().split())
    return cut if len(cut) <= limit and len(text) <= 2 * limit else f"{cut[: limit - 3]}..."
