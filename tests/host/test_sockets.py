"""WebSocket connections: duplicated tabs, slow readers, and messages that can always be sent."""

from __future__ import annotations

import asyncio
import json
import struct
import time
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType
from rectiflux.host import sockets
from rectiflux.host.json_writer import to_json
from rectiflux.host.server import Server
from rectiflux.host.sockets import notice_frame

from .client import Client


class Tab:
    """A browser tab: it connects again 0.3 s after its connection is closed, as the editor does."""

    def __init__(self) -> None:
        self.connects = 0
        self.open = False
        self.kinds: list[str] = []

    async def run(self, client: Client) -> None:
        while True:
            self.connects += 1
            async with client.http.ws_connect("/ws?clientId=same") as socket:
                self.open = True
                async for message in socket:
                    if message.type == WSMsgType.TEXT:
                        self.kinds.append(json.loads(message.data)["type"])
            self.open = False
            await asyncio.sleep(0.3)


def test_two_tabs_with_one_client_id_stay_connected(client: Client, prompts: Any) -> None:
    """Comfy-Org/ComfyUI#549, #16010, #16120, #16243: a duplicated tab has the same client id."""

    async def visit() -> tuple[Tab, Tab]:
        first, second = Tab(), Tab()
        tasks = [asyncio.create_task(tab.run(client)) for tab in (first, second)]
        await asyncio.sleep(1.0)
        await client.http.post("/api/prompt", json={"prompt": prompts.image(), "client_id": "same"})
        deadline = time.monotonic() + 60
        while not all("execution_success" in tab.kinds for tab in (first, second)):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        assert first.open and second.open
        tasks[0].cancel()  # the first tab closes; the second still receives
        await client.http.post("/api/prompt", json={"prompt": prompts.image(4), "client_id": "same"})
        while second.kinds.count("execution_success") < 2:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        tasks[1].cancel()
        return first, second

    first, second = client.runner.run(visit())
    assert (first.connects, second.connects) == (1, 1)


def test_an_editor_that_does_not_read_is_disconnected_and_others_are_not(
    server: Server, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "WAITING_LIMIT", 2**20)

    async def flood() -> None:
        slow = await client.http.ws_connect("/ws?clientId=slow", max_msg_size=0)
        async with client.http.ws_connect("/ws?clientId=other", max_msg_size=0) as other:
            server.sockets.send({"type": "big", "data": "x" * 2**21}, "slow")
            server.sockets.send({"type": "small", "data": "x"})
            await other.receive_json()
            assert (await other.receive_json())["type"] == "small"
        while (message := await slow.receive(30)).type == WSMsgType.TEXT:
            assert json.loads(message.data)["type"] == "status"
        assert message.type in (WSMsgType.CLOSED, WSMsgType.ERROR)

    client.runner.run(flood())


def test_any_notice_and_any_value_can_be_sent(client: Client, server: Server) -> None:
    frame = notice_frame({"node_id": "a\ud83e", "text": "half an emoji: \ud83e"})
    assert frame == struct.pack(">II", 3, 2) + b"a?" + b"half an emoji: ?"
    loop: list[Any] = [1]
    loop.append(loop)
    values = {"nan": float("nan"), "object": {1, 2}, "loop": loop, "half": "\ud83e", "inf": [float("-inf")]}
    with client.connect("/ws?clientId=me") as socket:
        assert socket.receive_json()["type"] == "status"
        server.sockets.send({"type": "executed", "data": values}, "me")
        data = socket.receive_json()["data"]
    assert (data["nan"], data["object"], data["half"], data["inf"]) == (None, "{1, 2}", "\ud83e", [None])
    assert json.loads(to_json(values))["loop"][0] == 1


def test_malformed_frames_close_their_connection_alone(client: Client) -> None:
    async def send() -> list[aiohttp.WSMsgType]:
        ends = []
        async with client.http.ws_connect("/ws?clientId=good") as good:
            for opcode, data in ((WSMsgType.TEXT, b"\xff\xfe"), (WSMsgType.TEXT, b"x" * (2**20 + 1))):
                bad = await client.http.ws_connect("/ws?clientId=good")
                await bad.receive()
                await bad.send_frame(data, opcode)
                ends.append((await bad.receive(10)).type)
            await good.send_str('{"type": "feature_flags"}')
            assert (await good.receive_json())["type"] == "status"
            assert (await good.receive_json())["type"] == "feature_flags"
        return ends

    assert set(client.runner.run(send())) == {WSMsgType.CLOSE}
