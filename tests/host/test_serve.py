"""The server as a process: who reaches it, and what a sudden death leaves."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest
from PIL import Image
from rectiflux.host.workflow import apply_settings, read_document, to_prompt

from .command import PATIENCE, ROOT, serving

pytestmark = pytest.mark.slow
CROSS = "workflows%2Fmy%20cross.json"


def ask(address: str, path: str, body: Any = None) -> bytes:
    """The answer to GET, or to POST when there is a body."""
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(address + path, data), timeout=PATIENCE) as answer:
        return answer.read()


def wait(happened: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := happened()):
        assert time.monotonic() < deadline
        time.sleep(0.002)  # the server computes on the same cores
    return found


def test_other_machines_find_no_door(tmp_path: Path) -> None:
    """Bound to 127.0.0.1 alone, the port is shut on any other address, such as 127.0.0.2."""
    with serving(tmp_path / "editor") as (address, _):
        port = urlsplit(address).port
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.2", port), timeout=5).close()


def test_killed_while_it_saves_it_leaves_whole_files(tmp_path: Path) -> None:
    folder, output = tmp_path / "editor", tmp_path / "editor" / "data" / "output"
    with serving(folder) as (address, process):
        info = json.loads(ask(address, "api/object_info"))
        document = read_document(ROOT / "workflows" / "text_to_image.json")
        document = apply_settings(document, ["steps=1", "cfg_scale=1", "batch_size=8"], info)
        ask(address, f"api/userdata/{CROSS}", document.graph)
        ask(address, "api/settings/a.b", 7)
        ask(address, "api/prompt", {"prompt": to_prompt(document, info)})
        wait(lambda: list(output.glob("*.png")))
        process.kill()
        process.wait(PATIENCE)
    pictures = sorted(output.glob("*.png"))
    for path in pictures:
        with Image.open(path) as picture:
            picture.load()
            assert picture.size == (128, 128)
    with serving(folder) as (address, _):
        assert json.loads(ask(address, f"api/userdata/{CROSS}")) == document.graph
        assert json.loads(ask(address, "api/settings/a.b")) == 7
        assert ask(address, f"api/view?filename={pictures[0].name}") == pictures[0].read_bytes()
        assert json.loads(ask(address, "api/queue")) == {"queue_running": [], "queue_pending": []}
