"""Malformed HTTP and WebSocket requests as bytes: every route, with fields, headers and frames gone wrong."""

from __future__ import annotations

import gzip
import json
import random
import struct
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "PROPFIND", "get", "G@T", "")
NAMES = (
    *(
        "x",
        "user.css",
        "workflows/a.json",
        "comfy.settings.json",
        "sum_00001_.png",
        "image.png",
        "..",
        ".",
        "",
    ),
    *(
        "../../etc/passwd",
        "/etc/passwd",
        "C:\\x",
        "\\x",
        "a\0b",
        "n" * 300,
        "ü\u2028",
        "con",
        "a/b/c/d",
        "-1",
    ),
    *("workflows", "🦊" * 70, "a\r\nb", "image.png [output]", "%2e%2e", "5", "é.png", ".hidden", "x" * 5000),
)
TEXTS = (
    *(
        "",
        "true",
        "false",
        "-1",
        "0",
        "1",
        "99999999999999999999",
        "1e999",
        "NaN",
        "webp;90",
        "webp;-5",
        "jpeg;x",
    ),
    *(
        "input",
        "output",
        "temp",
        "rgb",
        "a",
        "pending",
        "completed,failed",
        "[",
        "٣",
        "\0",
        "\udcff",
        "x" * 3000,
    ),
)
PARAMETERS = (
    *("filename", "subfolder", "type", "channel", "preview", "offset", "limit", "status", "max_items", "dir"),
    *("overwrite", "full_info", "recurse", "split", "clientId", "workflow_id", "rand", "template"),
)
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        2**70,
        1.5,
        1e308,
        "",
        "x",
        "\ud83e",
        "\0",
        "n" * 3000,
        [],
        {},
        [[]],
        {"": {}},
    ),
    *(["1", 0], ["1", -1], ["1", 0.5], [None], {"a": [1]}, "1", "⚠" * 50, [0] * 300),
)
RAW_BODIES = (
    *(
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"7",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"\xff\xfe",
        b"\x00" * 64,
    ),
    *(
        b'{"prompt": NaN}',
        b'{"prompt": 1e999}',
        b"9" * 5000,
        b"[" + b"[]," * 100_000 + b"[]]",
        b"\xef\xbb\xbf{}",
    ),
    *(b'{"prompt": "\\ud83e"}', b'{"a": 1, "a": 2}', b"a=b&c=d", b"--x\r\n\r\n--x--"),
)
HEADERS = (
    *(
        "Host: [",
        "Host: [::1",
        "Host: evil.example",
        "Host:",
        "Host: a b",
        "Host: \xff",
        "Host: 127.0.0.1:99999",
    ),
    *("Host: user@127.0.0.1", "Host: 127.0.0.1/x", "Origin: http://[", "Origin: null", "Origin: \xff\xfe"),
    *(
        "Origin: http://evil.example",
        "Sec-Fetch-Site: cross-site",
        "Sec-Fetch-Site: \xff",
        "Cookie: " + "a=b;" * 99,
    ),
    *(
        "Content-Type: application/json; charset=none",
        "Content-Type: text/plain; charset=utf-16",
        "Content-Type: \xff",
    ),
    *("Content-Type: multipart/form-data", "Content-Type: multipart/form-data; boundary=" + "b" * 300),
    *(
        "Content-Type: application/x-www-form-urlencoded; charset=rot13",
        "Content-Type: ;;;=",
        "Accept: text/html",
    ),
    *(
        "Content-Encoding: gzip",
        "Content-Encoding: deflate",
        "Content-Encoding: br",
        "Content-Encoding: rot13, gzip",
    ),
    *(
        "Expect: 100-continue",
        "Expect: something",
        "Range: bytes=5-1",
        "Range: bytes=x",
        "Range: bytes=0-99999999999",
    ),
    *(
        "If-Unmodified-Since: Thu, 01 Jan 9999999999 00:00:00 GMT",
        "If-Modified-Since: yesterday",
        "If-Modified-Since: Thu, 99 Jan 99999 00:00:00 GMT",
        'If-None-Match: "',
        "X: y",
    ),
    *(
        "If-Range: 0",
        "If-Match: *",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Connection: close",
        "Accept-Encoding: x",
    ),
    *(
        "Sec-WebSocket-Key: x",
        "Sec-WebSocket-Version: 99",
        "X-Long: " + "y" * 9000,
        "No colon",
        " folded",
        "\0: z",
    ),
)
PROMPT = {
    "prompt": {
        "1": {
            "class_type": "Number",
            "inputs": {"value": 1, "scale": 1.0, "mode": "plain", "label": "", "sure": True},
        },
        "2": {"class_type": "Add", "inputs": {"a": ["1", 0]}, "_meta": {"title": "Sum"}},
        "3": {"class_type": "Gray", "inputs": {"number": ["2", 0]}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "sum"}},
        "5": {"class_type": "LoadImage", "inputs": {"image": "image.png"}},
        "6": {"class_type": "PreviewAny", "inputs": {"source": ["2", 1]}},
    },
    "client_id": "me",
    "prompt_id": "1e0d0b6e-9f0a-4a3b-8c5d-2f6a7b8c9d0e",
    "extra_data": {"extra_pnginfo": {"workflow": {"id": "w", "nodes": []}}, "preview_method": "auto"},
    "front": False,
    "number": 1,
    "partial_execution_targets": ["4"],
}
JSON_BODIES: tuple[Any, ...] = (
    *(
        PROMPT,
        {"clear": True},
        {"delete": ["x"]},
        {"job_ids": ["x"]},
        {"prompt_id": "x"},
        {"unload_models": True},
    ),
    *({"Comfy.A": 1, "b": [2]}, {"enabled": True, "clientId": "me"}),
)


@dataclass(frozen=True)
class Input:
    """Bytes for a new connection. `complete`: the server owes a response."""

    data: bytes
    complete: bool = True


class RequestFuzzer:
    """Makes requests for (method, path) pairs, paths as aiohttp writes them: /jobs/{id}/cancel."""

    def __init__(self, routes: list[tuple[str, str]], seed: int) -> None:
        self.routes = routes
        self.random = random.Random(seed)

    def input(self) -> Input:
        """The next request."""
        return self.websocket() if self.random.random() < 0.1 else self.http()

    def http(self) -> Input:
        pick, chance = self.random.choice, self.random.random
        method, path = pick(self.routes)
        if chance() < 0.1:
            method = pick(METHODS)
        lines = [
            f"{method} {self._target(path)} HTTP/{pick(('1.1',) * 9 + ('1.0', '9.9'))}",
            "Host: 127.0.0.1",
        ]
        body, kind = self._body(path) if method not in ("GET", "HEAD") or chance() < 0.05 else (b"", None)
        if kind is not None:
            lines.append(f"Content-Type: {kind}")
        for header in self.random.sample(HEADERS, pick((0, 0, 0, 1, 1, 2))):
            name = header.partition(":")[0]
            lines = [line for line in lines if not line.startswith(f"{name}:")] + [header]
        if body and chance() < 0.1:
            body = gzip.compress(body) if chance() < 0.7 else body
            lines.append("Content-Encoding: gzip")
        complete = True
        if body and chance() < 0.1:
            lines.append("Transfer-Encoding: chunked")
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
            if chance() < 0.3:
                body, complete = body.replace(b"\r\n", pick((b"\n", b"\r", b"zz\r\n")), 1), False
        elif body or chance() < 0.1:
            missing = pick((0,) * 12 + (1, 1000))
            complete = missing == 0
            lines.append(f"Content-Length: {len(body) + missing}")
        head = "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n"
        if chance() < 0.05:
            head, complete = self._damaged(head), False
        return Input(head + body, complete)

    def _target(self, path: str) -> str:
        parts = []
        for part in path.split("/"):
            name = self.random.choice(NAMES) if part.startswith("{") else part
            parts.append(quote(name, safe="" if self.random.random() < 0.7 else "/.\\"))
        target = "/".join(parts)
        query = [
            f"{name}={quote(self._text(), safe='', errors='surrogateescape')}"
            for name in self.random.sample(PARAMETERS, self.random.choice((0, 0, 1, 2, 3)))
        ]
        if self.random.random() < 0.05:
            target = self.random.choice(
                ("//", "*", "http://evil.example/", "/%zz", "/\xff", "/%ff%fe", "?", "#")
            )
        return target + ("?" + "&".join(query) if query else "")

    def _text(self) -> str:
        return self.random.choice((*TEXTS, *NAMES))

    def _body(self, path: str) -> tuple[bytes, str | None]:
        """(body, its media type)"""
        if "upload" in path:
            return self._upload()
        if self.random.random() < 0.25:
            return self.random.choice(RAW_BODIES), None
        body = PROMPT if path.endswith("/prompt") else self.random.choice(JSON_BODIES)
        return json.dumps(self.mutated(body)).encode(), "application/json"

    def mutated(self, value: Any) -> Any:
        """A copy of a JSON value in which a few parts are replaced."""
        if self.random.random() < 0.04:
            return self.random.choice(VALUES)
        if isinstance(value, dict):
            return {name: self.mutated(item) for name, item in value.items() if self.random.random() > 0.02}
        return [self.mutated(item) for item in value] if isinstance(value, list) else value

    def _upload(self) -> tuple[bytes, str]:
        pick = self.random.choice
        fields = {"type": self._text(), "subfolder": self._text(), "overwrite": self._text()}
        fields["original_ref"] = pick(
            ('{"filename": "image.png", "type": "input"}', "[]", "{", "7", '{"filename": []}')
        )
        text = "".join(
            f'--X\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in fields.items()
            if self.random.random() < 0.6
        )
        name, extra = (
            pick(NAMES),
            pick(("", "", "Content-Transfer-Encoding: base64\r\n", "Content-Type: \r\n")),
        )
        text += f'--X\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n{extra}\r\n'
        data = text.encode(errors="replace") + pick((PNG, PNG[:40], b"", b"text")) + b"\r\n--X--\r\n"
        data = self._damaged(data) if self.random.random() < 0.2 else data
        return data, "multipart/form-data; boundary=X"

    def _damaged(self, data: bytes) -> bytes:
        at = self.random.randrange(len(data))
        junk = self.random.choice((b"", b"\0", b"\r\n", b"\xff\xff", b":" * 50))
        return data[:at] + junk + data[at + self.random.randrange(1, 9) :]

    def websocket(self) -> Input:
        """A handshake and frames; the last one closes the connection."""
        head = (
            f"GET /ws?clientId={quote(self._text(), safe='', errors='surrogateescape')} HTTP/1.1\r\n"
            "Host: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        )
        if self.random.random() < 0.3:
            head += "Sec-WebSocket-Extensions: permessage-deflate\r\n"
        frames = [self._frame() for _ in range(self.random.randrange(5))]
        return Input(head.encode() + b"\r\n" + b"".join(frames) + frame(8, struct.pack(">H", 1000)))

    def _frame(self) -> bytes:
        payload = self.random.choice(
            (
                b"",
                b"text",
                b"\xff\xfe",
                b'{"type": "feature_flags", "data": {}}',
                b"x" * 70_000,
                b'"feature_flags"',
            )
        )
        first = self.random.choice(
            (0x81, 0x82, 0x80, 0x01, 0x89, 0x8A, 0xC1, 0xF1, 0x83, 0x8F, 0x09, self.random.randrange(256))
        )
        length = self.random.choice((None, None, None, 2**63, 2**31, 0))
        return frame(first & 0x0F, payload, first & 0xF0, length, masked=self.random.random() < 0.9)


def frame(
    opcode: int, payload: bytes, flags: int = 0x80, length: int | None = None, masked: bool = True
) -> bytes:
    """A client's WebSocket frame; `length`: what it states instead of the payload's length."""
    size = len(payload) if length is None else length
    mask = 0x80 if masked else 0
    if size < 126:
        head = struct.pack(">BB", flags | opcode, mask | size)
    elif size < 2**16:
        head = struct.pack(">BBH", flags | opcode, mask | 126, size)
    else:
        head = struct.pack(">BBQ", flags | opcode, mask | 127, size)
    return head + (b"\0\0\0\0" if masked else b"") + payload


def _png() -> bytes:
    from io import BytesIO

    from PIL import Image

    buffer = BytesIO()
    Image.new("RGB", (8, 4), "red").save(buffer, "PNG")
    return buffer.getvalue()


PNG = _png()
