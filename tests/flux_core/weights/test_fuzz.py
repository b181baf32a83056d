"""Mutated model files: a model or one sentence, no crash, no hang, no memory beyond the file's size.

RECTIFLUX_FUZZ_INPUTS (default 60; 10000 for a campaign) and RECTIFLUX_FUZZ_SEED set how many and which.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

INPUTS = int(os.environ.get("RECTIFLUX_FUZZ_INPUTS", "60"))
SEED = int(os.environ.get("RECTIFLUX_FUZZ_SEED", "20261201"))

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")


def broken_by(seed: int, inputs: int, folder: Path) -> list[str]:
    """What `inputs` mutated files broke in a process of its own; that process ends by itself."""
    command = [sys.executable, Path(__file__).with_name("fuzz.py"), str(seed), str(inputs), folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0 and lines, f"it ended with {run.returncode}: {run.stderr[-2000:]}"
    assert sum(lines[-1]["counts"].values()) > inputs / 2
    return [f"{line['input']}: {line['problem']}" for line in lines[:-1]]


def test_mutated_files(tmp_path: Path) -> None:
    assert broken_by(SEED, INPUTS, tmp_path) == []


@pytest.mark.slow
def test_more_mutated_files(tmp_path: Path) -> None:
    assert broken_by(SEED + 1, max(200, INPUTS), tmp_path) == []
