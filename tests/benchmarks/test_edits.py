"""`bench adherence --variant kontext`: its scores with known editors, and its refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rectiflux.benchmarks.adherence import main, parser, sampling_of
from rectiflux.benchmarks.edits import UNSEEN, GenerateEdits, built_in_edits, run_edits
from rectiflux.benchmarks.prompts import EACH
from rectiflux.miniature.edits import KINDS, Edit, is_held_out


def obey(edits: Sequence[Edit]) -> list[np.ndarray]:
    return [edit.after.render() for edit in edits]


def copy(edits: Sequence[Edit]) -> list[np.ndarray]:
    return [edit.references[0].render() for edit in edits]


@pytest.mark.parametrize(("editor", "score"), [(obey, 1.0), (copy, 0.0)])
def test_an_editor_that_obeys_and_one_that_copies(
    editor: GenerateEdits, score: float, tmp_path: Path
) -> None:
    report, sheet = tmp_path / "report.json", tmp_path / "sheet.png"
    options = ["--variant", "kontext", "--quick", "--json", str(report), "--sheet", str(sheet)]
    args = parser().parse_args(options)
    assert run_edits(args, sampling_of(args), editor) == score
    figures = json.loads(report.read_text(encoding="utf-8"))["figures"]
    assert set(figures["categories"]) == {*KINDS, UNSEEN} and figures["sampling"]["steps"] == 28
    assert figures["checker"] == {"accuracy": 1.0, "false_accepts": 0.0}
    assert figures["psnr"] is None and sheet.is_file()


def test_edits_are_built_in_and_only_unseen_ones_are_held_out() -> None:
    edits = built_in_edits()
    assert edits == built_in_edits() and {len(some) for some in edits.values()} == {EACH}
    for kind, some in edits.items():
        assert {is_held_out(edit.after) for edit in some} == {kind == UNSEEN}


@pytest.mark.parametrize("option", [["--cfg", "3"], ["--size", "160x112"], ["--prompts", "mine.jsonl"]])
def test_options_that_edits_do_not_have_are_refused(
    option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--variant", "kontext", *option]) == 1
    assert option[0] in capsys.readouterr().err
