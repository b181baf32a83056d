"""Malformed workflow documents: saved graphs, prompts and PNGs, as trees and as bytes gone wrong."""

from __future__ import annotations

import copy
import json
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .test_subgraphs import LISTED, ON_NODE, QUARANTINE, nested, plan, primitive, use

JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, 1.5, -0.0, 1e308, float("nan"), float("inf")),
    *(
        "",
        "x",
        "0",
        "-10",
        "*",
        "fixed",
        "\ud83d",
        "a\nb",
        "ü🦊" * 40,
        "\0",
        "x" * 70_000,
        "%date:yyyy%/%a.b%",
        "1:2",
    ),
    *([], {}, [[]], [None], [1, 2], ["1", 0], ["1", -1], {"__value__": [1]}, {"id": 1}, [0] * 3000),
)
TEXTS = (
    "../x",
    "%Number.seed%",
    "%A Number.seed%.%Blend.x%",
    "CON",
    "a" * 300,
    "\ud83d",
    "image.png [output]",
)


def png(texts: list[tuple[bytes, bytes, bytes]]) -> bytes:
    """A 1 x 1 PNG with (chunk, key, text)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))]
    for kind, key, text in texts:
        if kind == b"zTXt":
            text = b"\0" + zlib.compress(text)
        parts.append(chunk(kind, key + b"\0" + (b"\0\0\0\0" if kind == b"iTXt" else b"") + text))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [*parts, chunk(b"IDAT", zlib.compress(b"\0\0")), chunk(b"IEND", b"")]
    )


def prompt() -> dict[str, Any]:
    """A prompt of the tests' tiny nodes."""
    number = {"value": 1, "scale": 1.0, "mode": "plain", "label": "", "sure": True}
    return {
        "1": {"class_type": "Number", "inputs": dict(number), "_meta": {"title": "A"}},
        "2": {"class_type": "Number", "inputs": {**number, "value": 2}},
        "3": {"class_type": "Add", "inputs": {"a": ["1", 0], "b": ["2", 0]}},
        "4": {"class_type": "Gray", "inputs": {"number": ["3", 0]}},
        "5": {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "sum"}},
        "6": {"class_type": "LoadImage", "inputs": {"image": "x.png"}},
        "7": {"class_type": "PreviewAny", "inputs": {"source": ["3", 1]}},
        "8": {"class_type": "PreviewImage", "inputs": {"images": ["6", 0]}},
    }


@dataclass(frozen=True)
class Input:
    """A file's bytes and `--set` options."""

    data: bytes
    settings: list[str]


class DocumentFuzzer:
    """Documents from a seed; `graphs` are valid ones to start from."""

    def __init__(self, seed: int, graphs: list[dict[str, Any]]) -> None:
        self.random = random.Random(seed)
        uses = [use(30, "plan", ON_NODE), use(31, "plan", ["other", 6, 3], ("seed",), proxyWidgets=LISTED)]
        self.documents = [
            *graphs,
            plan(*uses),
            plan(use(30, "plan", ON_NODE, proxyWidgetErrorQuarantine=[dict(QUARANTINE)]), text=[8, 3]),
            nested(ON_NODE),
            primitive(plan(use(30, "plan", ON_NODE, ("text", "seed", "n"))), "%Number.seed%"),
            prompt(),
            prompt(),
            {"prompt": prompt(), "extra_data": {"extra_pnginfo": {}}},
        ]
        self.changes: tuple[Callable[[Any], None], ...] = (
            *[self._replace] * 4,
            *(self._remove, self._repeat, self._swap, self._nest, self._copy, self._rename),
        )

    def input(self) -> Input:
        """The next one."""
        document = copy.deepcopy(self.random.choice(self.documents))
        for _ in range(self.random.choice((1, 1, 1, 2, 3, 8))):
            self.random.choice(self.changes)(document)
        text = json.dumps(document, ensure_ascii=self.random.random() < 0.5).encode(errors="replace")
        if self.random.random() < 0.3:
            key = self.random.choice((b"prompt", b"workflow"))
            kinds = [
                self.random.choice((b"tEXt", b"zTXt", b"iTXt")) for _ in range(self.random.choice((1, 2)))
            ]
            other = json.dumps(self.random.choice(self.documents)).encode()
            text = png([(kinds[0], key, text), *((kind, b"workflow", other) for kind in kinds[1:])])
        if self.random.random() < 0.15:
            text = self._damage(text)
        return Input(text, self._settings())

    def _settings(self) -> list[str]:
        names = (
            "seed",
            "30:4.seed",
            "filename_prefix",
            "text",
            "1.value",
            "5.filename_prefix",
            "31:4.seed",
            "steps",
        )
        values = ("9", "-1", "x", "", "1e9", *TEXTS)
        count = self.random.choice((0, 0, 0, 0, 0, 1, 2))
        return [f"{self.random.choice(names)}={self.random.choice(values)}" for _ in range(count)]

    def _place(self, document: Any) -> tuple[Any, Any]:
        """A random (container, key) inside a document."""
        found, key = document, None
        container = document
        while isinstance(found, (dict, list)) and found:
            container = found
            key = (
                self.random.choice(list(found))
                if isinstance(found, dict)
                else self.random.randrange(len(found))
            )
            found = found[key]
            if self.random.random() < 0.15:
                break
        return container, key

    def _replace(self, document: Any) -> None:
        container, key = self._place(document)
        if key is not None:
            container[key] = copy.deepcopy(self.random.choice((*JUNK, *TEXTS)))

    def _remove(self, document: Any) -> None:
        container, key = self._place(document)
        if key is not None:
            del container[key]

    def _repeat(self, document: Any) -> None:
        container, key = self._place(document)
        if isinstance(container, list) and key is not None and len(container) < 1000:
            container.extend(copy.deepcopy(container[key]) for _ in range(self.random.choice((1, 10, 300))))

    def _swap(self, document: Any) -> None:
        (first, key), (second, other) = self._place(document), self._place(document)
        if key is not None and other is not None:
            try:
                first[key], second[other] = copy.deepcopy(second[other]), copy.deepcopy(first[key])
            except (KeyError, IndexError):  # one was inside the other
                return

    def _copy(self, document: Any) -> None:
        """Put one part in the place of another."""
        (first, key), (second, other) = self._place(document), self._place(document)
        if key is not None and other is not None and len(json.dumps(second[other])) < 20_000:
            first[key] = copy.deepcopy(second[other])

    def _nest(self, document: Any) -> None:
        container, key = self._place(document)
        for _ in range(self.random.choice((1, 3, 60, 150)) if key is not None else 0):
            container[key] = [container[key]] if self.random.random() < 0.5 else {"a": container[key]}

    def _rename(self, document: Any) -> None:
        container, key = self._place(document)
        if isinstance(container, dict) and key is not None:
            container[self.random.choice(("", "id", "type", "inputs", "-10", "\ud83d", "k" * 5000))] = (
                container.pop(key)
            )

    def _damage(self, data: bytes) -> bytes:
        """Bytes flipped, cut out, repeated or inserted."""
        changed = bytearray(data)
        for _ in range(self.random.choice((1, 1, 2, 10))):
            at, count = self.random.randrange(len(changed) + 1), self.random.choice((1, 4, 100, 5000))
            kind = self.random.randrange(4)
            if kind == 0 and at < len(changed):
                changed[at] ^= 1 << self.random.randrange(8)
            elif kind == 1:
                del changed[at : at + count]
            elif kind == 2:
                changed[at:at] = changed[at : at + count]
            else:
                changed[at:at] = self.random.choice((b"[", b'{"a":', b"\xff", b"\\", b'"', b"[],")) * count
        return bytes(changed)
