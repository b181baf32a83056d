"""Writes JSON for the editor: valid text whatever a node or a client left in a value."""

from __future__ import annotations

import json
import math
from typing import Any

from aiohttp import web

MAX_DEPTH = 200


def to_json(value: Any) -> str:
    """ASCII JSON; NaN and infinities become null, other objects their repr, deep nesting "..."."""
    try:
        return json.dumps(value, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        return json.dumps(_plain(value, 0))


def json_response(value: Any, status: int = 200, reason: str | None = None) -> web.Response:
    """A response with the value as JSON."""
    return web.json_response(value, status=status, reason=reason, dumps=to_json)


def _plain(value: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        return "..."
    if isinstance(value, dict):
        return {str(name): _plain(item, depth + 1) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else repr(value)
