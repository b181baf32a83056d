"""The command `run.py serve`: its options, who can reach it, and what a killed process leaves behind."""

from __future__ import annotations

import asyncio
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
from rectiflux.host.serve import main
from rectiflux.host.workflow import apply_settings, read_document, to_prompt

from .command import PATIENCE, ROOT, serving

CROSS = "workflows%2Fmy%20cross.json"


def ask(address: str, path: str, body: Any = None) -> bytes:
    """The response to GET, or to POST with a body."""
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(address + path, data), timeout=PATIENCE) as answer:
        return answer.read()


def wait(happened: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := happened()):
        assert time.monotonic() < deadline
        time.sleep(0.002)  # the server computes on the same cores
    return found


def test_a_port_in_use_and_wrong_options_are_reported_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def occupy() -> asyncio.Server:
        return await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)

    with asyncio.Runner() as runner:
        other = runner.run(occupy())
        port = other.sockets[0].getsockname()[1]
        assert main(["--no-browser", "--port", str(port), "--data", str(tmp_path / "data")]) == 1
        other.close()
        runner.run(other.wait_closed())
    assert capsys.readouterr().err.startswith(f"port {port} is in use; ")
    for arguments, what in (
        (["--port", "70000"], "argument --port: must be an integer from 0 to 65535, got '70000'"),
        (["--port", "many"], "argument --port: must be an integer from 0 to 65535, got 'many'"),
        (["--models", "missing"], "argument --models: the folder missing does not exist"),
        (
            ["--allow-host", "http://x"],
            "argument --allow-host: must be a name such as x.example, got 'http://x'",
        ),
        (["--frob"], "unrecognized arguments: --frob"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 1
        assert capsys.readouterr().err == f"serve: {what} (see run.py serve --help)\n"
    (tmp_path / "file").touch()
    assert main(["--data", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.startswith("cannot write ")


@pytest.mark.slow
def test_other_machines_cannot_connect(tmp_path: Path) -> None:
    """Bound to 127.0.0.1 alone, the port is closed on every other address, such as 127.0.0.2."""
    with serving(tmp_path / "editor") as (address, _):
        port = urlsplit(address).port
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.2", port), timeout=5).close()


@pytest.mark.slow
def test_a_server_killed_while_saving_leaves_complete_files(tmp_path: Path) -> None:
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
    images = sorted(output.glob("*.png"))
    for path in images:
        with Image.open(path) as image:
            image.load()
            assert image.size == (128, 128)
    with serving(folder) as (address, _):
        assert json.loads(ask(address, f"api/userdata/{CROSS}")) == document.graph
        assert json.loads(ask(address, "api/settings/a.b")) == 7
        assert ask(address, f"api/view?filename={images[0].name}") == images[0].read_bytes()
        assert json.loads(ask(address, "api/queue")) == {"queue_running": [], "queue_pending": []}
