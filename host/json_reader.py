"""Reads JSON from outside the host: request bodies, settings, workflow files, the metadata of images.

Size, depth and number of values are checked on the bytes before a value is made, so that a document cannot
exhaust memory, time or the stack. As in the editor, NaN and infinities become null, the last of two equal
names counts, and half an emoji (a surrogate without its pair, which cannot be stored or sent) becomes U+FFFD.
"""

from __future__ import annotations

import json
import math
import re
from itertools import accumulate
from typing import Any

from ..flux_core.weights.messages import one_line, quoted

__all__ = ["JsonError", "one_line", "quoted", "read_json", "read_json_object"]

MAX_BYTES = 16 * 2**20
"""Bytes of a document; half as many with characters outside ASCII, which take up to four bytes in memory.

The largest workflows found in practice have less than 2 MB.
"""
MAX_DEPTH = 100
MAX_VALUES = 250_000
"""Objects, lists and elements of one document; at up to 130 bytes each they take 32 MB."""

_STRING = re.compile(rb'"[^"]*"')
_NOT_A_BRACKET = bytes(set(range(256)) - set(b"[]{}"))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


class JsonError(ValueError):
    """The document is refused; the message is one sentence for the user."""


def read_json(data: bytes | str, what: str = "the document", max_bytes: int = MAX_BYTES) -> Any:
    """The value in UTF-8 JSON, with or without a byte order mark; `what` names it in errors.

    Raises JsonError, one sentence that starts with `what`.
    """
    try:
        data = data.encode() if isinstance(data, str) else data
        _check_size(data, what, max_bytes)
        _check_structure(data, what)
        text = data.decode("utf-8-sig")
        value = json.loads(text, parse_constant=_null, parse_float=_finite)
    except UnicodeError as error:
        raise JsonError(f"{what} is not JSON: it must be text in UTF-8; save it again as JSON") from error
    except json.JSONDecodeError as error:
        if not text.strip():
            raise JsonError(f"{what} is empty; it must be JSON") from error
        raise JsonError(
            f"{what} is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg}); "
            "it may be truncated, save it again"
        ) from error
    except ValueError as error:
        if isinstance(error, JsonError):
            raise
        raise JsonError(f"{what} has an integer of more than 4300 digits; write a shorter one") from error
    return _without_surrogates(value) if _SURROGATE_ESCAPE.search(data) else value


def read_json_object(
    data: bytes | str, what: str = "the document", max_bytes: int = MAX_BYTES
) -> dict[str, Any]:
    """As `read_json`, for a document that must be an object. Raises JsonError."""
    value = read_json(data, what, max_bytes)
    if not isinstance(value, dict):
        raise JsonError(f"{what} must be a JSON object of names and values, got {quoted(value)}")
    return value


def _check_size(data: bytes, what: str, max_bytes: int) -> None:
    limit = max_bytes if data.isascii() else max_bytes // 2
    if len(data) > limit:
        raise JsonError(
            f"{what} is too large: the limit is {_size(limit)}, got {_size(len(data))}; "
            "remove what it embeds, such as images"
        )


def _size(count: int) -> str:
    return f"{count / 2**20:.3g} MB" if count >= 2**20 else f"{count} bytes"


def _check_structure(data: bytes, what: str) -> None:
    """Check the number of values and their depth, without making them."""
    data = data.replace(rb"\\", b"").replace(rb"\"", b"")
    strings = data.count(b'"') // 2
    _check_values(strings // 2, what)  # each is a value or a value's name
    structure = _STRING.sub(b"", data) if strings else data
    _check_values(structure.count(b",") + structure.count(b"[") + structure.count(b"{"), what)
    brackets = structure.translate(None, _NOT_A_BRACKET)
    depth = max(accumulate(map(_STEP.__getitem__, brackets)), default=0)
    if depth > MAX_DEPTH:
        raise JsonError(
            f"{what} is nested too deeply: the limit is {MAX_DEPTH} levels, got {depth:,}; flatten it"
        )


def _check_values(count: int, what: str) -> None:
    if count > MAX_VALUES:
        raise JsonError(
            f"{what} has too many values: the limit is {MAX_VALUES:,}, got about {count:,}; split it"
        )


def _null(name: str) -> None:
    """NaN and Infinity are not valid JSON; read them as null, as the editor does."""


def _finite(text: str) -> float | None:
    """A number; null for one that is too large, such as 1e999."""
    value = float(text)
    return value if math.isfinite(value) else None


def _without_surrogates(value: Any) -> Any:
    """The value with U+FFFD for each lone surrogate in its strings and names."""
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return value
