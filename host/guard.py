"""Middleware that refuses requests from other sites, sets security headers, and explains errors."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from .files import SaveError

log = logging.getLogger(__name__)

CONTENT_SECURITY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self'",
        "connect-src 'self' data:",
        "frame-src 'self'",
        "object-src 'self'",
        "frame-ancestors 'self'",
    )
)
"""ComfyUI's policy without API nodes (the page talks to this server only); no other page may frame it."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def is_loopback(name: str | None) -> bool:
    """Whether a host name is localhost or a loopback address."""
    if name is None or name == "localhost":
        return name is not None
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _refusal_reason(request: web.Request, loopback: bool) -> str | None:
    """Why a request does not come from the editor's own page; None when it does."""
    if request.headers.get("Sec-Fetch-Site") == "cross-site":
        return "requests from other sites are refused; open the address in a new tab"
    if loopback and not is_loopback(urlsplit(f"//{request.host}").hostname):
        return f"this editor is available on this machine only, not as {request.host}"
    origin = request.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc.lower() != request.host.lower():
        return f"requests from {origin} are refused; the editor is at {request.host}"
    return None


def guard(loopback: bool) -> Any:
    """Middleware that refuses cross-site requests (DNS rebinding included) and sets security headers."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        reason = _refusal_reason(request, loopback)
        if reason is not None:
            return web.Response(status=403, text=reason, headers=_security_headers(request))
        try:
            response = await handler(request)
        except web.HTTPException as error:
            error.headers.update(_security_headers(request))
            raise
        if not response.prepared:
            for name, value in _security_headers(request).items():
                response.headers.setdefault(name, value)
        return response

    return middleware


def _security_headers(request: web.Request) -> dict[str, str]:
    """Headers of every response; files in /assets/ may be cached, their names change with their contents."""
    cacheable = request.path.startswith("/assets/")
    return {
        "Content-Security-Policy": CONTENT_SECURITY,
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "max-age=31536000, immutable" if cacheable else "no-store",
    }


@web.middleware
async def explain_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer an invalid request with one sentence."""
    try:
        return await handler(request)
    except SaveError as error:
        return _error_response(507, str(error))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        log.debug("a request was refused", exc_info=error)
        return _error_response(400, str(error))


def _error_response(status: int, sentence: str) -> web.Response:
    reason = sentence.splitlines()[0].encode("ascii", "replace").decode() if sentence else None
    return web.json_response({"error": sentence}, status=status, reason=reason)
