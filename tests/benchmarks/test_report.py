"""The file of --json: written as a whole or not at all, and valid JSON."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
from rectiflux.benchmarks.report import add_json, positive, writable, write_report


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=3)
    add_json(parser)
    return parser.parse_args(arguments)


def test_values_with_options_and_machine(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    figures = {"orders": {1: 0.5, "bad": math.nan, "far": -math.inf}, "rows": [(1, 2.5)], "at": Path("a/b")}
    write_report(parsed("--json", str(file)), "flow", figures)
    report = json.loads(file.read_text())
    assert report["benchmark"] == "flow" and report["options"] == {"steps": 3}
    orders = {"1": 0.5, "bad": None, "far": None}
    assert report["figures"] == {"orders": orders, "rows": [[1, 2.5]], "at": str(Path("a/b"))}
    assert {"processor", "threads", "torch", "python", "system", "cuda"} == report["machine"].keys()
    assert list(tmp_path.iterdir()) == [file]


def test_a_failure_keeps_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    file.write_text("old")
    with pytest.raises(TypeError):
        write_report(parsed("--json", str(file)), "flow", {"what": object()})
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_invalid_values_are_refused(tmp_path: Path) -> None:
    for name in (str(tmp_path), str(tmp_path / "none" / "x.json")):
        with pytest.raises(argparse.ArgumentTypeError, match="folder that exists"):
            writable(name)
    assert writable("figures.json") == Path("figures.json")
    for text in ("0", "-1", "1.5", "many"):
        with pytest.raises(argparse.ArgumentTypeError, match=text):
            positive(text)
    assert positive("12") == 12
