"""The file that --json writes: whole or not at all, and only what JSON knows."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
from rectiflux.benchmarks.report import add_json, writable, write_report


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=3)
    add_json(parser)
    return parser.parse_args(arguments)


def test_every_figure_with_what_it_was_measured_on(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    figures = {"orders": {1: 0.5, "bad": math.nan, "far": -math.inf}, "rows": [(1, 2.5)], "at": Path("a/b")}
    write_report(parsed("--json", str(file)), "flow", figures)
    report = json.loads(file.read_text())
    assert report["benchmark"] == "flow" and report["options"] == {"steps": 3}
    assert report["figures"] == {
        "orders": {"1": 0.5, "bad": None, "far": None},
        "rows": [[1, 2.5]],
        "at": str(Path("a/b")),
    }
    assert {"processor", "threads", "torch", "python", "system", "cuda"} == report["machine"].keys()
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_nothing_is_written_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_report(parsed(), "flow", {})
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    file.write_text("old")
    with pytest.raises(TypeError):
        write_report(parsed("--json", str(file)), "flow", {"what": object()})
    assert file.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    for name in (str(tmp_path), str(tmp_path / "none" / "x.json")):
        with pytest.raises(argparse.ArgumentTypeError) as caught:
            writable(name)
        assert str(caught.value) == f"{name} must be a file in a folder that exists"
    assert writable("figures.json") == Path("figures.json")
