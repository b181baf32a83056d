"""The adherence benchmark: its arithmetic, its messages, and the whole with two painters.

One paints true renders, which must score 1.00, the other something else, which must score 0.00.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rectiflux.benchmarks.adherence import first_pictures, main
from rectiflux.benchmarks.generate import Painted, figures_of, judge_pictures
from rectiflux.benchmarks.prompts import SIX, Prompt, categories, parse_prompt
from rectiflux.miniature.scene import Scene

from ..nodes.tiny import NAMES, SPEC, write_models, write_transformer
from .generators import paint_falsely, paint_truly

LINE = '{"prompt": "a star", "objects": [{"shape": "star"}]}'


def test_true_renders_score_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, sheet = tmp_path / "report.json", tmp_path / "sheet.png"
    assert main(["--quick", "--json", str(report), "--sheet", str(sheet)], paint_truly) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"checker: 1\.0000 of 100 true renders pass \(128x128 1\.000 .*\)", lines[0])
    assert re.fullmatch(r"checker: 0\.00\d\d of \d+ near misses pass \(shape 0\.000 .*\)", lines[1])
    assert lines[-1] == "overall 1.00"
    assert re.fullmatch(r"\d+\.\d{3} seconds a picture, sharpness (0\.9\d|1\.0\d)", lines[-2])
    figures = json.loads(report.read_text(encoding="utf-8"))["figures"]
    assert figures["overall"] == 1.0 and len(figures["prompts"]) == len(categories()[::8])
    assert {row["score"] for row in figures["categories"].values()} == {1.0}
    assert figures["sampling"]["steps"] == 28 and figures["sampling"]["cfg_scale"] == 3.5
    assert sheet.is_file()


def test_something_else_scores_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick"], paint_falsely) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "overall 0.00"


def test_every_prompt_of_ours_can_be_painted_rightly() -> None:
    prompts = categories()
    painted = judge_pictures(prompts, paint_truly(prompts), 1)
    assert [one.prompt.text for one in painted if not all(one.right)] == []


def test_prompts_of_a_file_are_scored_by_their_categories(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One category right and one wrong: 0.50, whatever their sizes; two pictures of each prompt."""
    path = tmp_path / "mine.jsonl"
    wrong = '{"prompt": "no", "category": "bad", "objects": [{"shape": "star", "colour": "red"}]}'
    path.write_text(f"{LINE}\n{LINE}\n{wrong}\n", encoding="utf-8")
    asked: list[str] = []

    def painter(prompts: Sequence[Prompt]) -> list[np.ndarray]:
        asked.extend(prompt.text for prompt in prompts)
        return paint_truly(
            [p if p.text != "no" else parse_prompt(wrong.replace("red", "blue")) for p in prompts]
        )

    assert main(["--prompts", str(path), "--seeds", "2", "--renders", "50"], painter) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "overall 0.50"
    assert asked == ["a star"] * 4 + ["no"] * 2


def test_scores_are_shares_of_pictures_and_their_mean_over_the_six() -> None:
    """One category half right, the others wholly: (5 + 0.5) / 6; the rest counts for nothing."""
    right, wrong = {"count": True, "shape": True}, {"count": True, "shape": False}
    painted = [Painted(Prompt("x", Scene(), name), [right, right], [0.5]) for name in SIX[1:]]
    painted += [Painted(Prompt("x", Scene(), SIX[0]), [right, wrong], [1.0])]
    painted += [Painted(Prompt("x", Scene(), name), [wrong, wrong], []) for name in ("unseen", "words")]
    figures = figures_of(painted)
    assert figures["overall"] == pytest.approx(5.5 / 6)
    assert figures["sharpness"] == pytest.approx(3.5 / 6)
    assert figures["categories"]["single object"] == {
        "prompts": 1,
        "pictures": 2,
        "score": 0.5,
        "attributes": {"count": 1.0, "shape": 0.5},
    }
    assert figures["categories"]["unseen"]["score"] == 0.0
    assert figures["prompts"][5] == {
        "prompt": "x",
        "category": "single object",
        "right": [True, False],
        "wrong": [[], ["shape"]],
    }


def test_the_sheet_has_eight_prompts_a_category() -> None:
    prompts = [Prompt("x", Scene(), "a")] * 16 + [Prompt("x", Scene(), "b")] * 3
    pictures = [np.full((4, 4, 3), i, dtype=np.uint8) for i in range(38)]
    found = first_pictures(prompts, pictures, 2)
    assert found[::4, ::4, 0].tolist() == [[*range(0, 32, 4)], [32, 34, 36, 32, 34, 36, 32, 34]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--solver", "magic"], "solver must be one of euler"),
        (["--size", "100x128"], "width and height must be positive multiples of 16, got 100x128"),
        (["--models", "nowhere"], "rectiflux-mini-pro.safetensors; train it (run.py train) or name another"),
        (["--model", "none.safetensors"], "there is no none.safetensors; train it"),
        (["--variant", "dev", "--models", "nowhere"], "rectiflux-mini-dev.safetensors; train it"),
        (["--variant", "reflow", "--models", "nowhere"], "rectiflux-mini-reflow.safetensors; train it"),
        (["--prompts", "bad.jsonl"], "bad.jsonl, line 1: this is no JSON"),
        (["--prompts", "none.jsonl"], "No such file or directory: 'none.jsonl'"),
    ],
)
def test_what_cannot_run_says_why(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text("a star", encoding="utf-8")
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("bench adherence: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "'0' must be a whole number above 0"),
        (["--size", "large"], "'large' must be WIDTHxHEIGHT, such as 128x128"),
        (["--variant", "max"], "invalid choice: 'max'"),
        (["--shift", "twice"], "invalid choice: 'twice'"),
    ],
)
def test_what_cannot_be_an_option_says_why(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Options that name models with random weights, one prompt and a small picture."""
    models = write_models(tmp_path)
    text = models / "text_encoders"
    files = ["--model", str(models / "diffusion_models" / NAMES["diffusion_models"])]
    files += ["--vae", str(models / "vae" / NAMES["vae"])]
    files += ["--text", str(text / NAMES["clip"]), str(text / NAMES["t5"])]
    path = tmp_path / "mine.jsonl"
    path.write_text(LINE, encoding="utf-8")
    return [*files, "--prompts", str(path), "--size", "96x64", "--steps", "2", "--quick", "--threads", "1"]


def test_what_a_model_cannot_do_says_why(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A guidance-distilled file, taken for the undistilled variant."""
    write_transformer(tmp_path / "distilled.safetensors", replace(SPEC, guidance_embed=True))
    assert main([*tiny, "--model", str(tmp_path / "distilled.safetensors")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("bench adherence: ") and "guidance" in error


def test_models_paint(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """From files to the last line: random weights paint nothing that is known."""
    assert main(tiny) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "overall 0.00"
    assert re.search(r"^autoencoder: 0\.0000 of renders pass after it, -?\d+\.\d dB$", out, re.MULTILINE)
    assert "1/1" in err and "pictures painted" in err
