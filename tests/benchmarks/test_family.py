"""The family's benchmark: figures of members that are known exactly, texts, and the whole from files."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rectiflux.benchmarks import family_variants as variants_module
from rectiflux.benchmarks.family import HUES, TITLES, evenly, last_line, main, table, unseen_table
from rectiflux.benchmarks.family_variants import WAYS, Member, files_of_way, seconds_of, straightness_of
from rectiflux.benchmarks.generate import load_models
from rectiflux.benchmarks.prompts import SIX, Prompt, categories
from rectiflux.flux_core.model.spec import Velocity
from rectiflux.flux_core.pipeline import VelocityRequest, draw_noise, guided_velocity
from rectiflux.miniature.scene import Scene
from torch import Tensor

from ..nodes.tiny import SPEC, write_models, write_transformer
from .generators import paint_falsely, paint_truly

SQUARES = 575 / 6912
"""S of the velocity t over 24 steps: the variance of 1/24, 2/24 .. 1, (24^2 - 1) / (12 24^2)."""


@dataclass(frozen=True)
class Known(Member):
    """Paints rightly what belongs to the first `right` of the six categories; its velocity is slope t.

    Nothing here looks at its models, so tests give it None for them.
    """

    right: Callable[[int], int] = lambda steps: 6
    slope: float = 1.0
    asked: list[tuple[int, list[str]]] = field(default_factory=list)

    def paint(
        self, prompts: Sequence[Prompt], steps: int, on_batch: Callable[[int], None]
    ) -> list[np.ndarray]:
        self.asked.append((steps, [prompt.text for prompt in prompts]))
        good = SIX[: self.right(steps)]
        found = zip(prompts, paint_truly(prompts), paint_falsely(prompts), strict=True)
        on_batch(len(prompts) // 2)
        on_batch(len(prompts))
        return [true if prompt.category in good else false for prompt, true, false in found]

    def velocity(self, texts: Sequence[str]) -> Velocity:
        return lambda x, sigma: torch.full_like(x, self.slope * sigma)

    def png(self, text: str, steps: int, seed: int) -> bytes:
        return b""


def known(variant: str, right: Callable[[int], int], slope: float) -> Known:
    return Known(None, WAYS[variant], right, slope)  # type: ignore[arg-type]


def test_the_whole_on_members_that_are_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Adherence is a number of sixths, S that of the slope, and the picture shows both."""
    picture, report = tmp_path / "family.png", tmp_path / "family.json"
    family: dict[str, Member] = {
        "pro": known("pro", lambda steps: 6 if steps == 28 else 0, 3.0),
        "stochastic": known("stochastic", lambda steps: 5 if steps == 28 else 0, 3.0),
        "reflow": known("reflow", lambda steps: 4, 1.0),
        "dev": known("dev", lambda steps: 5 if steps == 28 else 1, 2.0),
        "schnell": known("schnell", lambda steps: 3 if steps > 1 else 2, 0.5),
    }
    options = ["--quick", "--steps", "28", "4", "1", "4", "--figure", str(picture), "--json", str(report)]
    assert main(options, family) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert (
        lines[0]
        == "Adherence / sharpness after so many steps (49 prompts, one picture of each, 128 x 128 pixels):"
    )
    number = r"(?:0\.9\d|1\.0\d)"
    cells = {
        "pro": "0.00 0.00 1.00",
        "stochastic": "0.00 0.00 0.83",
        "reflow": "0.67 0.67 0.67",
        "dev": "0.17 0.17 0.83",
        "schnell": "0.33 0.50 0.50",
    }
    straight = {
        "pro": "0.749",
        "stochastic": "0.749",
        "reflow": "0.0832",
        "dev": "0.333",
        "schnell": "0.0208",
    }
    times = {
        "pro": "0.00 in 28",
        "stochastic": "0.00 in 28",
        "reflow": "0.00 in 4",
        "dev": "0.00 in 28",
        "schnell": "0.00 in 4, 0.00 in 1",
    }
    for line, variant in zip(lines[4:9], TITLES, strict=True):
        scores = r" \| ".join(f"{re.escape(cell)} / {number}" for cell in cells[variant].split())
        passes = 2 if variant in ("pro", "stochastic") else 1
        row = rf"\| {TITLES[variant]} \| {passes} \| {scores} \| {straight[variant]} \| {times[variant]} \|"
        assert re.fullmatch(row, line), line
    assert lines[-1] == "family pro@28 1.00 dev@28 0.83 schnell@4 0.50 schnell@1 0.33 straightness_ratio 9.0"
    assert re.search(r"\] (\d+)/\1 ", err.splitlines()[-1]), "all the work that was announced was done"
    figures = json.loads(report.read_text(encoding="utf-8"))["figures"]["variants"]
    assert figures["dev"]["straightness"] == pytest.approx(4 * SQUARES, rel=1e-5)
    assert list(figures["pro"]["steps"]) == ["1", "4", "28"]
    assert figures["dev"]["steps"]["28"]["categories"]["attribute binding"]["score"] == 0.0
    assert figures["dev"]["sampling"]["guidance"] == 3.5
    with Image.open(picture) as drawn:
        assert {colour for _, colour in drawn.getcolors(1 << 20) or []} >= set(HUES.values())


def test_every_way_is_asked_for_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """Every prompt but those of "words", so often as there are seeds, in each number of steps."""

    class Blank(Known):
        def paint(
            self, prompts: Sequence[Prompt], steps: int, on_batch: Callable[[int], None]
        ) -> list[np.ndarray]:
            self.asked.append((steps, [prompt.text for prompt in prompts]))
            return [np.full((64, 64, 3), 128, dtype=np.uint8)] * len(prompts)

    family = {name: Blank(None, WAYS[name]) for name in ("reflow", "schnell")}  # type: ignore[arg-type]
    assert main(["--seeds", "2", "--steps", "2", "--variants", "reflow", "schnell"], {**family}) == 0
    texts = [prompt.text for prompt in categories() if prompt.category != "words" for _ in range(2)]
    assert family["reflow"].asked == family["schnell"].asked == [(2, texts)]
    assert len(texts) == 2 * 7 * 56
    assert capsys.readouterr().out.splitlines()[-1] == "family"


def figures(
    overall: float, sharpness: float, straightness: float, seconds: dict[int, float]
) -> dict[str, Any]:
    one = {"overall": overall, "sharpness": sharpness, "categories": {"unseen": {"score": overall / 2}}}
    worse = {**one, "overall": overall / 2, "sharpness": math.nan}
    return {
        "passes_a_step": 1,
        "steps": {1: worse, 28: one},
        "straightness": straightness,
        "seconds": seconds,
    }


FOUND = {
    "pro": {**figures(0.928, 0.984, 0.12345, {28: 2.104}), "passes_a_step": 2},
    "schnell": figures(0.8, 1.02, 1.5, {4: 0.449, 1: 0.25}),
}


def test_the_table_of_known_figures() -> None:
    assert table(FOUND) == (
        "| sampling | network passes a step | 1 step | 28 steps | S | seconds a picture in so many steps |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| pro | 2 | 0.46 / - | 0.93 / 0.98 | 0.123 | 2.10 in 28 |\n"
        "| schnell | 1 | 0.40 / - | 0.80 / 1.02 | 1.5 | 0.45 in 4, 0.25 in 1 |"
    )
    assert unseen_table(FOUND) == (
        "| sampling | 1 step | 28 steps |\n"
        "| --- | --- | --- |\n"
        "| pro | 0.46 | 0.46 |\n"
        "| schnell | 0.40 | 0.40 |"
    )


def test_the_last_line_has_what_was_measured() -> None:
    assert last_line(FOUND) == "family pro@28 0.93 schnell@1 0.40"
    assert last_line({**FOUND, "reflow": figures(0.9, 1.0, 0.0196, {4: 0.4})}) == (
        "family pro@28 0.93 schnell@1 0.40 straightness_ratio 6.3"
    )


def test_straightness_prompts_come_from_all_categories() -> None:
    prompts = [prompt for prompt in categories() if prompt.category != "words"]
    chosen = evenly(prompts, 64)
    assert len({id(prompt) for prompt in chosen}) == 64
    counts = [sum(prompt.category == name for prompt in chosen) for name in (*SIX, "unseen")]
    assert sum(counts) == 64 and set(counts) == {9, 10}


def test_straightness_is_a_mean_over_prompts_and_elements() -> None:
    """Of a velocity len(text) t, for more prompts than a batch holds: mean len^2 times SQUARES."""

    class ByLength(Known):
        def velocity(self, texts: Sequence[str]) -> Velocity:
            lengths = torch.tensor([len(text) for text in texts]).reshape(-1, 1, 1, 1)
            return lambda x, sigma: (lengths * sigma).expand_as(x).to(x)

    prompts = [Prompt("x" * (1 + i), Scene(), "any") for i in range(21)]
    told: list[int] = []
    found = straightness_of(ByLength(None, WAYS["pro"]), prompts, told.append)  # type: ignore[arg-type]
    assert found == pytest.approx(sum((1 + i) ** 2 for i in range(21)) / 21 * SQUARES, rel=1e-5)
    assert told == [16 * 24 * 2, 5 * 24 * 2]


def test_seconds_are_medians_of_turns_without_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of our own: round n takes steps + n^2 seconds, the first, which allocates, 100 more."""
    now = 0.0
    monkeypatch.setattr(variants_module.time, "perf_counter", lambda: now)
    turns: list[tuple[int, int]] = []

    class Clocked(Known):
        def png(self, text: str, steps: int, seed: int) -> bytes:
            nonlocal now
            turns.append((seed, steps))
            now += steps + seed**2 + 100 * (seed == 0)
            return b""

    family: dict[str, Member] = {name: Clocked(None, WAYS[name]) for name in ("dev", "schnell")}  # type: ignore[arg-type]
    runs = [("dev", 28), ("schnell", 4), ("schnell", 1)]
    passes: list[int] = []
    found = seconds_of(family, runs, [Prompt("x", Scene(), "any")], 3, passes.append)
    assert found == {("dev", 28): 32.0, ("schnell", 4): 8.0, ("schnell", 1): 5.0}
    assert [number for number, _ in turns] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert all(sorted(steps for n, steps in turns if n == i) == [1, 4, 28] for i in range(4))
    assert sum(passes) == 4 * 33


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole family of random weights, dev with its guidance embedder."""
    models = write_models(tmp_path_factory.mktemp("models"))
    for path in [*models.glob("vae/*"), *models.glob("text_encoders/*")]:
        path.rename(path.with_name(path.name.replace("tiny", "rectiflux-mini")))
    for variant in TITLES:
        spec = replace(SPEC, guidance_embed=variant == "dev")
        write_transformer(files_of_way(models, variant).transformer, spec)
    return models


def member_of(models: Path, variant: str) -> Member:
    return Member(load_models(files_of_way(models, variant)), WAYS[variant])


@pytest.mark.parametrize("variant", TITLES)
def test_a_timed_picture_is_the_painted_one(tiny: Path, variant: str) -> None:
    """Guidance, schedule and noise are the same from prompt to PNG as in the scored pictures."""
    member = member_of(tiny, variant)
    painted = member.paint([Prompt("a red star", Scene(), "any")], 3, lambda done: None)
    with Image.open(io.BytesIO(member.png("a red star", 3, 0))) as picture:
        assert picture.format == "PNG" and picture.size == (128, 128)
        assert np.abs(np.asarray(picture).astype(int) - painted[0]).max() <= 1
    assert painted[0].std() > 1


def test_straightness_is_that_of_the_guided_velocity(tiny: Path) -> None:
    """Of pro against Euler written out, with both halves of CFG 3.5 computed apart."""
    member = member_of(tiny, "pro")
    texts = ["a red star", "two blue circle", "green"]
    encode, network = member.models.text_encoders.encode, member.models.transformer

    def half(words: list[str]) -> Velocity:
        return guided_velocity(network, VelocityRequest(encode(words), None, 16, 16, len(words)))

    with torch.no_grad():
        positive, negative = half(texts), half([""] * 3)
        noise = draw_noise(0, 3, 16, 16)
        x, passed = noise, list[Tensor]()
        for i in range(24):
            empty = negative(x, 1 - i / 24)
            passed.append(empty + 3.5 * (positive(x, 1 - i / 24) - empty))
            x = x - passed[-1] / 24
        expected = torch.stack([(noise - x - v).square().mean() for v in passed]).mean().item()
    prompts = [Prompt(text, Scene(), "any") for text in texts]
    found = straightness_of(member, prompts, lambda passes: None)
    assert expected > 1e-3 and found == pytest.approx(expected, rel=1e-3)


def test_the_whole_from_files(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Random weights paint nothing that is known."""
    options = ["--quick", "--steps", "1", "--variants", "schnell", "dev", "--threads", "1"]
    assert main([*options, "--models", str(tiny)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[4:6]] == ["| dev", "| schnell"]
    assert lines[-1] == "family schnell@1 0.00"


def test_a_missing_file_is_named_before_anything_is_loaded(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of the four is the one that is not there."""
    for name in ("vae", "text_encoders"):
        (tmp_path / name).symlink_to(tiny / name)
    (tmp_path / "diffusion_models").mkdir()
    for variant in ("pro", "reflow", "dev"):
        files_of_way(tmp_path, variant).transformer.symlink_to(files_of_way(tiny, variant).transformer)
    missing = files_of_way(tmp_path, "schnell").transformer
    monkeypatch.setattr(variants_module, "load_models", lambda files: pytest.fail("loaded"))
    assert main(["--models", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"bench family: there is no {missing}; train it (run.py train) or name another place\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "'0' must be a whole number above 0"),
        (["--steps", "4", "many"], "'many' must be a whole number above 0"),
        (["--variants", "max"], "invalid choice: 'max'"),
        (["--figure", "nowhere/x.png"], "must be a file in a folder that exists"),
    ],
)
def test_what_cannot_be_an_option_says_why(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
