"""Mutated model files: a model or one sentence, no crash, no hang, no memory beyond the file's size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ...fuzzing import fuzz_inputs, fuzz_seed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")


def test_mutated_files(tmp_path: Path) -> None:
    """In one process of its own, since what fails may end it."""
    inputs = fuzz_inputs(200)
    command = [
        sys.executable,
        Path(__file__).with_name("fuzz.py"),
        str(fuzz_seed()),
        str(inputs),
        tmp_path / "seeds",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0 and lines, f"it ended with {run.returncode}: {run.stderr[-2000:]}"
    assert [f"{line['input']}: {line['problem']}" for line in lines[:-1]] == []
    assert sum(lines[-1]["counts"].values()) == inputs
