"""A client of the server for the tests: over HTTP, without a browser."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from aiohttp.test_utils import TestClient, TestServer
from rectiflux.host.server import Server

Client = TestClient[Any, Any]


@contextlib.asynccontextmanager
async def serving(server: Server, loopback: bool = True) -> AsyncIterator[Client]:
    async with TestClient(TestServer(server.app(loopback))) as client:
        yield client


async def post_json(client: Client, path: str, body: Any) -> Any:
    async with client.post(path, json=body) as response:
        assert response.status == 200, await response.text()
        return json.loads(await response.text() or "null")


async def get_json(client: Client, path: str) -> Any:
    async with client.get(path) as response:
        assert response.status == 200, await response.text()
        return await response.json()
