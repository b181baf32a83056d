"""A synchronous HTTP and WebSocket client over the server, for tests without a browser."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from aiohttp import ClientWebSocketResponse, WSMessage
from aiohttp.test_utils import TestClient, TestServer
from rectiflux.host.connections import Runner
from rectiflux.host.server import Server


@dataclass(frozen=True)
class Response:
    """A complete response."""

    status: int
    headers: Any
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.text or "null")


class _Served(TestServer):
    """The server with the connections of `run.py serve`."""

    async def _make_runner(self, **options: Any) -> Runner:
        return Runner(self.app, **options)


class Client:
    """A running server; `with` starts and stops it."""

    def __init__(self, server: Server, loopback: bool = True, allowed_hosts: Iterable[str] = ()) -> None:
        self.app = server.app(loopback, allowed_hosts)

    def __enter__(self) -> Client:
        self.runner = asyncio.Runner()
        self.runner.run(self._start())
        return self

    async def _start(self) -> None:
        self.http = TestClient(_Served(self.app))
        await self.http.start_server()

    def __exit__(self, *_: object) -> None:
        self.runner.run(self.http.close())
        self.runner.close()

    def request(self, method: str, path: str, **options: Any) -> Response:
        async def send() -> Response:
            async with self.http.request(method, path, **options) as response:
                return Response(response.status, response.headers, await response.read())

        return self.runner.run(send())

    def raw(self, data: bytes) -> bytes:
        """The response to bytes on a new connection, until the server closes it."""

        async def send() -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.http.port)
            writer.write(data)
            answer = await reader.read()
            writer.close()
            return answer

        return self.runner.run(asyncio.wait_for(send(), 10))

    def get(self, path: str, **options: Any) -> Response:
        return self.request("GET", path, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> Response:
        """POST `body` as JSON; other bodies go into `data`."""
        return self.request("POST", path, **({} if body is None else {"json": body}), **options)

    def get_json(self, path: str) -> Any:
        """The JSON of a response with status 200."""
        response = self.get(path)
        assert response.status == 200, response.text
        return response.json

    def post_json(self, path: str, body: Any) -> Any:
        """The JSON of a response with status 200."""
        response = self.post(path, body)
        assert response.status == 200, response.text
        return response.json

    def sleep(self, seconds: float) -> None:
        """Let the server run."""
        self.runner.run(asyncio.sleep(seconds))

    def connect(self, path: str) -> Socket:
        return Socket(self.runner, self.runner.run(self.http.ws_connect(path)))


class Socket:
    """A WebSocket; `with` closes it."""

    def __init__(self, runner: asyncio.Runner, socket: ClientWebSocketResponse[Any]) -> None:
        self.runner = runner
        self.socket = socket

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *_: object) -> None:
        self.runner.run(self.socket.close())

    def send_json(self, data: Any) -> None:
        self.runner.run(self.socket.send_json(data))

    def receive(self) -> WSMessage:
        return self.runner.run(self.socket.receive(60))

    def receive_json(self) -> Any:
        return json.loads(self.receive().data)
