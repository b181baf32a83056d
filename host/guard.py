"""Refuses requests from other sites and under foreign host names, and sets the security headers."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from .json_reader import quoted

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

HOST_NAME = re.compile(r"[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?")
LOCAL_DOMAINS = ("local", "lan", "home.arpa")
"""Top-level names that nobody can register, so that no site of the internet can have them."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def is_loopback(name: str | None) -> bool:
    """Whether a host name is localhost or a loopback address."""
    if name is None or name == "localhost":
        return name is not None
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def own_names() -> set[str]:
    """The host names by which this machine is known: its name, alone and in the local domains."""
    full = socket.gethostname().lower().rstrip(".")
    short = full.partition(".")[0]
    return {full, short, *(f"{short}.{domain}" for domain in LOCAL_DOMAINS)} - {""}


class Hosts:
    """The host names under which requests are answered.

    A name that somebody else controls can be made to point at this machine (DNS rebinding); its page then
    counts as the editor's own. So names are listed. An address cannot point elsewhere; any is accepted,
    unless `loopback`: then only this machine's.
    """

    def __init__(self, loopback: bool, names: Iterable[str] = ()) -> None:
        self.loopback = loopback
        self.names = {name.lower() for name in names} | (set() if loopback else own_names())

    def __contains__(self, name: str) -> bool:
        if is_loopback(name) or name in self.names:
            return True
        return not self.loopback and _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _host_name(host: str) -> str | None:
    """The name in a Host header, without port and final dot; None when it is malformed."""
    try:
        parts = urlsplit(f"//{host}")
        name = (parts.hostname or "").removesuffix(".")
        is_valid = parts.netloc == host and "@" not in host and (parts.port is None or parts.port >= 0)
    except ValueError:
        return None
    return name if is_valid and (_is_address(name) or HOST_NAME.fullmatch(name)) else None


def _is_link(request: web.Request) -> bool:
    """Whether a link or a bookmark opens the page in a tab of its own, which changes nothing."""
    headers = request.headers
    is_page = headers.get("Sec-Fetch-Mode") == "navigate" and headers.get("Sec-Fetch-Dest") == "document"
    return is_page and request.method in ("GET", "HEAD")


def _refusal(request: web.Request, hosts: Hosts) -> tuple[int, str] | None:
    """(status, why) for a request that does not come from the editor's own page; None when it does."""
    site = request.headers.get("Sec-Fetch-Site", "none")
    if site not in ("none", "same-origin") and not _is_link(request):
        return 403, "requests from other sites are refused; open the address in a new tab"
    host, origin = request.host, request.headers.get("Origin")
    name = _host_name(host)
    if name is None:
        return 400, f"the Host header must be a host name with an optional port, got {quoted(host)}"
    if name not in hosts:
        if hosts.loopback:
            return 403, f"this editor is available on this machine only, not as {host[:200]}"
        return (
            403,
            f"this editor is not known as {name[:200]}; if it is, start it with --allow-host {name[:200]}",
        )
    if origin is not None and _authority(origin) != host.lower():
        return 403, f"requests from {_shown(origin)} are refused; the editor is at {_shown(host)}"
    return None


def _authority(origin: str) -> str | None:
    """Host and port of an Origin header; None when it has none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _shown(text: str) -> str:
    """A header's value as it stands, or quoted when it is not plain text."""
    return text if text.isascii() and text.isprintable() and len(text) <= 200 else quoted(text)


def guard(hosts: Hosts) -> Any:
    """Middleware that refuses cross-site requests, DNS rebinding included."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        refused = _refusal(request, hosts)
        if refused is not None:
            return web.Response(status=refused[0], text=refused[1])
        return await handler(request)

    return middleware


async def set_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Set the security headers of any response; for the application's signal `on_response_prepare`."""
    for name, value in security_headers(request, response.status).items():
        response.headers.setdefault(name, value)


def security_headers(request: web.BaseRequest, status: int) -> dict[str, str]:
    """Headers of every response; files in /assets/ may be cached, their names change with their contents."""
    cacheable = request.path.startswith("/assets/") and status < 400
    return {
        "Content-Security-Policy": CONTENT_SECURITY,
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "max-age=31536000, immutable" if cacheable else "no-store",
    }
