"""`run.py serve` in its own process, as a user starts it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_INSTALLING = """
import os, sys, run
run.set_library_defaults(os.environ)
sys.exit(run.dispatch("serve", sys.argv[1:]))
"""
PATIENCE = 120  # seconds, until a test fails


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """(address, process) of an editor with its data in `folder`/data; it is stopped at the end."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "run.py", "serve", "--no-browser", "--port", "0", "--data", folder / "data"]
    command += options
    if Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():  # run.py would create that environment
        command[1:3] = ["-c", WITHOUT_INSTALLING]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, cwd=ROOT, stderr=log) as process:
        try:
            yield _address(process, folder / "log"), process
        finally:
            process.terminate()
            process.wait(PATIENCE)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + PATIENCE
    while not (found := re.search(r"http://127\.0\.0\.1:\d+/", log.read_text())):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return found[0]
