"""The editors' WebSocket connections, their Console panel, and binary messages (previews, texts)."""

from __future__ import annotations

import asyncio
import json
import logging
import struct
import uuid
from collections import deque
from collections.abc import Callable
from io import BytesIO
from typing import Any

from aiohttp import WSMsgType, web
from PIL import Image

from .file_routes import UPLOAD_LIMIT

FEATURES = {"supports_preview_metadata": True, "max_upload_size": UPLOAD_LIMIT}
PREVIEW_SIDE = 512  # maximum of the longer side, pixels


class Sockets:
    """The open editors. `send` may be called from any thread; each editor receives messages in order."""

    def __init__(self) -> None:
        self._queues: dict[str, asyncio.Queue[str | bytes | None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def send(self, message: dict[str, Any] | bytes, client_id: str | None = None) -> None:
        """Send a message to one editor, or to all without `client_id`."""
        data = message if isinstance(message, bytes) else json.dumps(message)
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._put, data, client_id)

    def _put(self, data: str | bytes | None, client_id: str | None) -> None:
        for name, queue in self._queues.items():
            if client_id in (None, name):
                queue.put_nowait(data)

    async def serve(
        self, request: web.Request, greeting: Callable[[str], list[dict[str, Any]]]
    ) -> web.StreamResponse:
        """Serve one editor's WebSocket until it closes; `greeting(client id)` gives its first messages."""
        self._loop = asyncio.get_running_loop()
        client_id = request.query.get("clientId") or uuid.uuid4().hex
        socket = web.WebSocketResponse(heartbeat=30, max_msg_size=2**20)
        await socket.prepare(request)
        queue: asyncio.Queue[str | bytes | None] = asyncio.Queue()
        for message in greeting(client_id):
            queue.put_nowait(json.dumps(message))
        if client_id in self._queues:  # the same editor, reconnected
            self._queues[client_id].put_nowait(None)
        self._queues[client_id] = queue
        writer = asyncio.create_task(self._write(socket, queue))
        try:
            async for message in socket:
                if message.type == WSMsgType.TEXT and '"feature_flags"' in message.data:
                    queue.put_nowait(json.dumps({"type": "feature_flags", "data": FEATURES}))
        finally:
            queue.put_nowait(None)
            await writer
            if self._queues.get(client_id) is queue:
                del self._queues[client_id]
        return socket

    @staticmethod
    async def _write(socket: web.WebSocketResponse, queue: asyncio.Queue[str | bytes | None]) -> None:
        """Send queued messages until None, then close the socket."""
        try:
            while (data := await queue.get()) is not None:
                await (socket.send_bytes(data) if isinstance(data, bytes) else socket.send_str(data))
        except ConnectionError:
            pass
        await socket.close()

    async def close(self, app: web.Application) -> None:
        """Close all connections."""
        self._put(None, None)


class Console(logging.StreamHandler):
    """Logs to stderr and to the editor's Console panel; keeps the last lines for editors opened later."""

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self.entries: deque[dict[str, str]] = deque(maxlen=300)
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        text = self.format(record).replace("\n", "\r\n")
        self.entries.append({"t": str(record.created), "m": f"{text}\r\n"})
        self._send({"type": "logs", "data": {"entries": [self.entries[-1]]}})


def preview_frame(data: dict[str, Any]) -> bytes:
    """Type 4: length of the metadata, the metadata as JSON, then the image as JPEG in its final size."""
    image = Image.fromarray(data["pixels"].numpy())
    scale = min(8, PREVIEW_SIDE / max(image.size))
    image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    node = data["node_id"]
    target = {"node_id": node, "display_node_id": node, "parent_node_id": None, "real_node_id": node}
    head = json.dumps({**target, "prompt_id": data["prompt_id"], "image_type": "image/jpeg"}).encode()
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return struct.pack(">II", 4, len(head)) + head + buffer.getvalue()


def notice_frame(data: dict[str, Any]) -> bytes:
    """Type 3: length of the node id, the node id, then the text that it shows."""
    node = data["node_id"].encode()
    return struct.pack(">II", 3, len(node)) + node + data["text"].encode()
