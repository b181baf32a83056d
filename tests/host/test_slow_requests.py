"""Requests that never finish, or are larger than anything useful: others are served meanwhile."""

from __future__ import annotations

import asyncio
import gc
import io
import json

import pytest
from rectiflux.host import connections, request_reading
from rectiflux.host.server import Server

from .client import Client

POST = b"POST /api/prompt HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
FORM = b"POST /api/upload/image HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
FORM += b"Content-Type: multipart/form-data; boundary=X\r\n"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_body_that_does_not_arrive_is_answered_in_time(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_reading, "BODY_PATIENCE", 0.2)
    monkeypatch.setattr(request_reading, "SLOWEST_BODY", 2**40)
    part = b'--X\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nx'
    for data in (
        POST + b"Content-Length: 9\r\n\r\n{",
        POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
        FORM + b"Content-Length: 99\r\n\r\n" + part,
    ):
        answer = client.raw(data)
        assert answer.startswith(b"HTTP/1.1 408 ") and b"did not arrive within" in answer
    gc.collect()  # the file of the upload, which aiohttp leaves open


def test_a_connection_without_a_request_is_closed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "FIRST_REQUEST_LIMIT", 0.2)
    with Client(server) as client:
        for data in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: "):
            assert client.raw(data) == b""
        assert client.get("/api/users").status == 200
        with client.connect("/ws") as socket:
            assert socket.receive_json()["type"] == "status"
            client.sleep(0.4)
            socket.send_json({"type": "feature_flags"})
            assert socket.receive_json()["type"] == "feature_flags", "the limit ends with the first request"


MANY_LISTS = b"[" + b"[]," * (15 * 2**18) + b"[]]"
PATHS = ("/api/prompt", "/api/queue", "/api/settings", "/api/settings/a")


def test_a_huge_body_is_refused_and_others_are_served_meanwhile(client: Client) -> None:
    async def send(path: str, data: bytes) -> None:
        big = asyncio.create_task(client.http.post(path, data=io.BytesIO(data)))
        for _ in range(3):
            async with client.http.get("/api/prompt") as response:
                assert response.status == 200
        response = await asyncio.wait_for(big, 30)
        assert response.status == 400
        sentence = json.loads(await response.text())["error"]
        assert sentence.startswith("the request ") and len(sentence) < 300

    bodies = (b'{"prompt": %b}' % MANY_LISTS, MANY_LISTS, b"[" * 2**20, b"9" * 2**20)
    for path, data in zip(PATHS, bodies, strict=True):
        client.runner.run(send(path, data))
    client.runner.run(send("/api/settings/a", b"[" * 100_000))
    assert "Comfy.VueNodes.Enabled" in client.get_json("/api/settings")


def test_responses_that_nobody_reads_are_not_made_in_advance(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 500 requests on one connection, only those are handled whose responses its buffers hold."""
    handled = []

    def describe() -> dict[str, str]:
        handled.append(1)
        return {"a": "x" * 2**20}

    monkeypatch.setattr(server.registry, "object_info", describe)

    async def send(client: Client) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.http.port, limit=2**16)
        writer.write(b"GET /api/object_info HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 500)
        while True:  # until the server makes no more
            before = len(handled)
            await asyncio.sleep(0.5)
            if len(handled) == before > 0:
                break
        async with client.http.get("/api/users") as response:
            assert response.status == 200, "others are served"
        count = len(handled)
        await reader.readexactly(30 * 2**20)
        assert len(handled) > count, "it goes on when they are read"
        writer.transport.abort()
        return count

    with Client(server) as client:
        assert 0 < client.runner.run(asyncio.wait_for(send(client), 60)) < 50
