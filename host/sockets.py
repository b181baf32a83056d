"""The editors' WebSocket connections, their Console panel, and binary messages (previews, texts)."""

from __future__ import annotations

import asyncio
import logging
import struct
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from typing import Any

from aiohttp import WSMsgType, web
from PIL import Image

from .file_routes import UPLOAD_LIMIT
from .json_writer import to_json

log = logging.getLogger(__name__)

FEATURES = {"supports_preview_metadata": True, "max_upload_size": UPLOAD_LIMIT}
PREVIEW_SIDE = 512  # maximum of the longer side, pixels
WAITING_LIMIT = 32 * 2**20  # bytes of messages that an editor has not read


class _Editor:
    """One open connection: its client id, and the messages that wait to be sent."""

    def __init__(self, client_id: str, request: web.Request) -> None:
        self.client_id = client_id
        self._transport = request.transport
        self._queue: asyncio.Queue[str | bytes | None] = asyncio.Queue()
        self._waiting = 0  # bytes

    def put(self, data: str | bytes | None) -> None:
        """Append a message, or the end; the connection is closed when its browser does not read."""
        self._waiting += len(data or "")
        if self._waiting > WAITING_LIMIT and self._transport is not None:
            log.warning("an editor does not read its messages; its connection is closed")
            self._transport.abort()
            while not self._queue.empty():
                self._queue.get_nowait()
            data = None
        self._queue.put_nowait(data)

    async def write(self, socket: web.WebSocketResponse) -> None:
        """Send messages until the end, then close the socket."""
        try:
            while (data := await self._queue.get()) is not None:
                await (socket.send_bytes(data) if isinstance(data, bytes) else socket.send_str(data))
                self._waiting -= len(data)
        except ConnectionError:
            pass
        await socket.close()


class Sockets:
    """The open editors. `send` may be called from any thread; each editor receives messages in order.

    Several may have the same client id, as a duplicated browser tab has; each receives that id's messages.
    """

    def __init__(self) -> None:
        self._editors: list[_Editor] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def send(self, message: dict[str, Any] | bytes, client_id: str | None = None) -> None:
        """Send a message to the editors of one client id, or to all without `client_id`."""
        data = message if isinstance(message, bytes) else to_json(message)
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._put, data, client_id)

    def _put(self, data: str | bytes | None, client_id: str | None) -> None:
        for editor in self._editors:
            if client_id in (None, editor.client_id):
                editor.put(data)

    async def serve(
        self, request: web.Request, greeting: Callable[[str], list[dict[str, Any]]]
    ) -> web.StreamResponse:
        """Serve one editor's WebSocket until it closes; `greeting(client id)` gives its first messages."""
        self._loop = asyncio.get_running_loop()
        socket = web.WebSocketResponse(heartbeat=30, max_msg_size=2**20)
        await socket.prepare(request)
        editor = _Editor(request.query.get("clientId") or uuid.uuid4().hex, request)
        for message in greeting(editor.client_id):
            editor.put(to_json(message))
        self._editors.append(editor)
        writer = asyncio.create_task(editor.write(socket))
        try:
            async for message in socket:
                if message.type == WSMsgType.TEXT and '"feature_flags"' in message.data:
                    editor.put(to_json({"type": "feature_flags", "data": FEATURES}))
        finally:
            self._editors.remove(editor)
            editor.put(None)
            await writer
        return socket

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
    head = to_json({**target, "prompt_id": data["prompt_id"], "image_type": "image/jpeg"}).encode()
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return struct.pack(">II", 4, len(head)) + head + buffer.getvalue()


def notice_frame(data: dict[str, Any]) -> bytes:
    """Type 3: length of the node id, the node id, then the text that it shows."""
    node = data["node_id"].encode(errors="replace")
    return struct.pack(">II", 3, len(node)) + node + data["text"].encode(errors="replace")
