"""The HTTP connections: aiohttp's, with time limits, and with our headers and sentence on its own errors."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from aiohttp import web

from .guard import security_headers
from .json_reader import quoted

log = logging.getLogger(__name__)

FIRST_REQUEST_LIMIT = 60.0
"""Seconds from connecting to the end of the first request's headers; browsers connect ahead of use."""
KEEP_ALIVE = 75.0
"""Seconds without a complete request after which a used connection is closed."""


LINGERING = 1.0
"""Seconds for the rest of a body that a refused request still sends."""


class Connection(web.RequestHandler):
    """One connection. It is closed when its first request does not arrive in time."""

    _overdue: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        loop = asyncio.get_running_loop()
        self._overdue = loop.call_later(FIRST_REQUEST_LIMIT, self.force_close)

    def on_request(self) -> None:
        """Called with each request whose headers are complete, and with each that is not HTTP."""
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None

    def connection_lost(self, exc: BaseException | None) -> None:
        self.on_request()
        super().connection_lost(exc)

    def log_exception(self, *arguments: Any, **options: Any) -> None:
        """Called when reading the rest of a request fails, whose response was sent."""
        log.debug(*arguments, **options)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The response to a request that is not HTTP, or whose handler failed outside the middlewares."""
        if request.writer.output_size > 0:
            raise ConnectionError("the response was sent in part and cannot be replaced by an error")
        sentence = "the server failed; its log says more"
        if isinstance(exc, ConnectionError):  # nobody reads the response
            status, sentence = 400, "the connection was closed"
        elif status < 500:
            reason = str(message or exc).partition("\n")[0].rstrip(":")
            sentence = f"the request is not valid HTTP: {quoted(reason)}"
            log.debug("a request was refused", exc_info=exc)
        else:
            log.error("the request %s %s failed", request.method, quoted(request.raw_path), exc_info=exc)
        response = web.Response(status=status, text=sentence, headers=security_headers(request, status))
        response.force_close()
        return response


class _Server(web.Server):
    """Makes a Connection for each client."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._make = self.request_factory
        self.request_factory = self._request
        self._options = {**options, "keepalive_timeout": KEEP_ALIVE, "lingering_time": LINGERING}
        del self._options["request_factory"]
        self._options.pop("handler_cancellation", None)

    def _request(self, message: Any, payload: Any, protocol: Any, *rest: Any) -> web.BaseRequest:
        protocol.on_request()
        return self._make(message, payload, protocol, *rest)

    def __call__(self) -> Connection:
        return Connection(self, loop=asyncio.get_running_loop(), **self._options)


class Runner(web.AppRunner):
    """Runs an application with our connections."""

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(made.request_handler, request_factory=made.request_factory, **self._kwargs)
