"""`bench adherence`: its scores with two known generators, with models, and its refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rectiflux.benchmarks.adherence import first_images, main
from rectiflux.benchmarks.generate import Generate, ScoredPrompt, check_images, scores
from rectiflux.benchmarks.prompts import SIX, Prompt, categories, parse_prompt
from rectiflux.miniature.scene import Scene

from ..nodes.tiny import NAMES, write_models
from .generators import generate_right, generate_wrong

LINE = '{"prompt": "a star", "objects": [{"shape": "star"}]}'


@pytest.mark.parametrize(("generator", "score"), [(generate_right, 1.0), (generate_wrong, 0.0)])
def test_a_generator_that_follows_all_or_no_prompts(
    generator: Generate, score: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, sheet = tmp_path / "report.json", tmp_path / "sheet.png"
    assert main(["--quick", "--json", str(report), "--sheet", str(sheet)], generator) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"overall {score:.2f}"
    figures = json.loads(report.read_text(encoding="utf-8"))["figures"]
    assert figures["overall"] == score and len(figures["prompts"]) == len(categories()[::8])
    assert figures["checker"]["accuracy"] == 1.0 and figures["checker"]["false_accepts"] < 0.01
    assert score == 0.0 or 0.9 < figures["sharpness"] < 1.1
    assert sheet.is_file()


def test_every_built_in_prompt_can_be_followed() -> None:
    prompts = categories()
    scored = check_images(prompts, generate_right(prompts), 1)
    assert [one.prompt.text for one in scored if not all(one.right)] == []


def test_prompts_of_a_file_are_scored_by_their_categories(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One category right and one wrong give 0.50, whatever their sizes; two images of each prompt."""
    path = tmp_path / "mine.jsonl"
    wrong = '{"prompt": "no", "category": "bad", "objects": [{"shape": "star", "colour": "red"}]}'
    path.write_text(f"{LINE}\n{LINE}\n{wrong}\n", encoding="utf-8")
    received: list[str] = []

    def generator(prompts: Sequence[Prompt]) -> list[np.ndarray]:
        received.extend(prompt.text for prompt in prompts)
        other = parse_prompt(wrong.replace("red", "blue"))
        return generate_right([other if prompt.text == "no" else prompt for prompt in prompts])

    assert main(["--prompts", str(path), "--seeds", "2", "--renders", "50"], generator) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "overall 0.50"
    assert received == ["a star"] * 4 + ["no"] * 2


def test_the_overall_score_is_the_mean_over_the_six_categories() -> None:
    """One category half right, the others right: (5 + 0.5) / 6; further categories do not count."""
    right, wrong = {"count": True, "shape": True}, {"count": True, "shape": False}
    scored = [ScoredPrompt(Prompt("x", Scene(), name), [right, right], [0.5]) for name in SIX[1:]]
    scored += [ScoredPrompt(Prompt("x", Scene(), SIX[0]), [right, wrong], [1.0])]
    scored += [ScoredPrompt(Prompt("x", Scene(), "unseen"), [wrong, wrong], [])]
    figures = scores(scored)
    assert figures["overall"] == pytest.approx(5.5 / 6)
    assert figures["sharpness"] == pytest.approx(3.5 / 6)
    first = figures["categories"][SIX[0]]
    assert first["score"] == 0.5 and first["attributes"] == {"count": 1.0, "shape": 0.5}
    assert figures["categories"]["unseen"]["score"] == 0.0
    assert figures["prompts"][5]["right"] == [True, False] and figures["prompts"][5]["wrong"] == [
        [],
        ["shape"],
    ]


def test_the_sheet_has_eight_prompts_a_category() -> None:
    prompts = [Prompt("x", Scene(), "a")] * 16 + [Prompt("x", Scene(), "b")] * 3
    images = [np.full((4, 4, 3), i, dtype=np.uint8) for i in range(38)]
    found = first_images(prompts, images, 2)
    assert found[::4, ::4, 0].tolist() == [[*range(0, 32, 4)], [32, 34, 36, 32, 34, 36, 32, 34]]


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--solver", "magic"], "magic"),
        (["--size", "100x128"], "100x128"),
        (["--models", "nowhere"], "rectiflux-mini-pro.safetensors"),
        (["--variant", "reflow", "--models", "nowhere"], "rectiflux-mini-reflow.safetensors"),
        (["--model", "none.safetensors"], "none.safetensors"),
        (["--prompts", "bad.jsonl"], "bad.jsonl, line 1"),
        (["--prompts", "none.jsonl"], "none.jsonl"),
    ],
)
def test_invalid_input_is_named_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    value: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text("a star", encoding="utf-8")
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("bench adherence: ") and value in error and error.count("\n") == 1


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Options with models of random weights, one prompt and a small image."""
    models = write_models(tmp_path)
    text = models / "text_encoders"
    files = ["--model", str(models / "diffusion_models" / NAMES["diffusion_models"])]
    files += ["--vae", str(models / "vae" / NAMES["vae"])]
    files += ["--text", str(text / NAMES["clip"]), str(text / NAMES["t5"])]
    path = tmp_path / "mine.jsonl"
    path.write_text(LINE, encoding="utf-8")
    return [*files, "--prompts", str(path), "--size", "96x64", "--steps", "2", "--quick", "--threads", "1"]


def test_random_models_score_nothing(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tiny) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "overall 0.00"
