"""`run.py serve` is killed (SIGKILL) again and again: nothing finished is lost, no half file is served.

RECTIFLUX_FUZZ_SEED sets at which moments, and every 250 of RECTIFLUX_FUZZ are one kill. Starting the editor
takes seconds, so one process imports it and forks a server for each trial.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
from PIL import Image
from rectiflux.host.workflow import apply_settings, read_document, to_prompt

from ..fuzzing import fuzz_inputs, fuzz_seed
from .command import PATIENCE, ROOT

KILLS, SEED = max(1, fuzz_inputs(1000) // 250), fuzz_seed()
FORKING = """
import importlib, os, sys
import run
run.load_pack()
importlib.import_module("rectiflux.host.serve")
for line in sys.stdin:  # each the log of a server to start
    if (child := os.fork()) == 0:
        os.dup2(os.open(line.strip(), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os._exit(run.dispatch("serve", ["--no-browser", "--port", "0", "--data", sys.argv[1]]))
    print(child, flush=True)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]


class Editors:
    """Starts servers on one data folder."""

    def __init__(self, folder: Path) -> None:
        self.data, self.log = folder / "data", folder / "log"
        self.count = 0
        self.process: int | None = None
        self.parent = subprocess.Popen(
            [sys.executable, "-c", FORKING, self.data],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def kill(self) -> None:
        """Kill the running server."""
        if self.process is not None:
            os.kill(self.process, signal.SIGKILL)
            self.process = None

    def start(self) -> str:
        """The address of a new server."""
        assert self.parent.stdin is not None and self.parent.stdout is not None
        self.count += 1
        log = self.log.with_name(f"log{self.count}")
        self.parent.stdin.write(f"{log}\n")
        self.parent.stdin.flush()
        self.process = int(self.parent.stdout.readline())
        deadline = time.monotonic() + PATIENCE
        while not (
            log.exists() and (at := (text := log.read_text()).find("http://")) >= 0 and "\n" in text[at:]
        ):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        return text[at:].split()[0]

    def close(self) -> None:
        """Kill the server and end the process that forks them."""
        self.kill()
        self.parent.communicate(timeout=PATIENCE)


@pytest.fixture
def editors(tmp_path: Path) -> Iterator[Editors]:
    found = Editors(tmp_path)
    yield found
    found.close()


def ask(address: str, path: str, body: Any = None) -> Any:
    """The JSON of a response to GET, or to POST with a body."""
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(address + path, data), timeout=PATIENCE) as answer:
        return json.loads(answer.read() or b"null")


class Writer(threading.Thread):
    """Writes settings, user files and images until its server is gone; `done`: what was acknowledged."""

    def __init__(self, address: str, prompt: dict[str, Any], trial: int) -> None:
        super().__init__()
        self.address, self.prompt, self.trial = address, prompt, trial
        self.done = 0
        self.images: set[str] = set()

    def run(self) -> None:
        try:
            ask(self.address, "api/prompt", {"prompt": self.prompt})
            while True:
                value = self.done + 1
                content = {"trial": self.trial, "value": value, "fill": "x" * 300_000}
                ask(self.address, f"api/userdata/workflows%2F{self.trial}.json", content)
                ask(self.address, f"api/settings/trial{self.trial}", value)
                self.done = value
                for job in ask(self.address, "api/jobs?status=completed,in_progress")["jobs"]:
                    outputs = ask(self.address, f"api/jobs/{job['id']}")["outputs"].values()
                    self.images.update(image["filename"] for shown in outputs for image in shown["images"])
        except (URLError, ConnectionError, TimeoutError, json.JSONDecodeError, OSError):
            return


def check(address: str, data: Path, writer: Writer) -> None:
    """What the writer's server acknowledged is there and whole."""
    settings = ask(address, "api/settings").get(f"trial{writer.trial}", 0)
    assert settings in (writer.done, writer.done + 1)
    if writer.done:
        found = ask(address, f"api/userdata/workflows%2F{writer.trial}.json")
        assert found["value"] in (writer.done, writer.done + 1) and len(found["fill"]) == 300_000
    listed = {name.removesuffix(" [output]") for name in ask(address, "internal/files/output")}
    assert writer.images <= listed
    for name in listed:
        with Image.open(data / "output" / name) as image:
            image.load()
            assert "prompt" in image.info
    for entry in ask(address, "api/userdata?dir=workflows"):
        assert not entry.endswith((".part", ".damaged"))
        json.loads((data / "user" / "workflows" / entry).read_text())


def test_a_killed_editor_loses_nothing_finished_and_serves_no_half_file(editors: Editors) -> None:
    moments = random.Random(SEED)
    address = editors.start()
    info = ask(address, "api/object_info")
    document = read_document(ROOT / "workflows" / "text_to_image.json")
    for trial in range(KILLS):
        settings = ["steps=1", "cfg_scale=1", "batch_size=4", f"seed={trial}"]
        writer = Writer(address, to_prompt(apply_settings(document, settings, info), info), trial)
        writer.start()
        time.sleep(moments.uniform(0.05, 4.0))
        editors.kill()
        writer.join(PATIENCE)
        address = editors.start()
        check(address, editors.data, writer)
