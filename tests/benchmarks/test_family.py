"""`bench family`: values of variants that are known exactly, and the whole from files."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rectiflux.benchmarks.family import COLORS, TITLES, evenly, main
from rectiflux.benchmarks.family_variants import VARIANTS, Variant, seconds_of, straightness_of, variant_files
from rectiflux.benchmarks.generate import load_models
from rectiflux.benchmarks.prompts import SIX, Prompt, categories
from rectiflux.flux_core.model.spec import Velocity
from rectiflux.flux_core.pipeline import VelocityRequest, draw_noise, guided_velocity
from rectiflux.miniature.scene import Scene
from torch import Tensor

from ..nodes.tiny import SPEC, write_models, write_transformer
from .generators import generate_right, generate_wrong

STRAIGHTNESS = 575 / 6912
"""S of the velocity t over 24 steps: the variance of 1/24, 2/24 .. 1, (24^2 - 1) / (12 24^2)."""


@dataclass(frozen=True)
class Known(Variant):
    """Follows the prompts of the first `right` of the six categories; its velocity is slope t."""

    right: Callable[[int], int] = lambda steps: 6
    slope: float = 1.0

    def generate(
        self, prompts: Sequence[Prompt], steps: int, on_batch: Callable[[int], None]
    ) -> list[np.ndarray]:
        good = SIX[: self.right(steps)]
        found = zip(prompts, generate_right(prompts), generate_wrong(prompts), strict=True)
        on_batch(len(prompts))
        return [true if prompt.category in good else false for prompt, true, false in found]

    def velocity(self, texts: Sequence[str]) -> Velocity:
        return lambda x, sigma: torch.full_like(x, self.slope * sigma)

    def png(self, text: str, steps: int, seed: int) -> bytes:
        return b""


def known(name: str, right: Callable[[int], int], slope: float) -> Known:
    return Known(None, VARIANTS[name], right, slope)  # type: ignore[arg-type]  # it uses no models


def test_the_whole_with_known_variants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Adherence is a number of sixths, S that of the slope, and the figure shows every variant."""
    figure, report = tmp_path / "family.png", tmp_path / "family.json"
    family: dict[str, Variant] = {
        "pro": known("pro", lambda steps: 6 if steps == 28 else 0, 3.0),
        "stochastic": known("stochastic", lambda steps: 5 if steps == 28 else 0, 3.0),
        "reflow": known("reflow", lambda steps: 4, 1.0),
        "dev": known("dev", lambda steps: 5 if steps == 28 else 1, 2.0),
        "schnell": known("schnell", lambda steps: 3 if steps > 1 else 2, 0.5),
    }
    options = ["--quick", "--steps", "28", "4", "1", "4", "--figure", str(figure), "--json", str(report)]
    assert main(options, family) == 0
    out = capsys.readouterr().out
    last = "family pro@28 1.00 dev@28 0.83 schnell@4 0.50 schnell@1 0.33 straightness_ratio 9.0"
    assert out.splitlines()[-1] == last
    assert all(f"| {title} |" in out for title in TITLES.values())
    found = json.loads(report.read_text(encoding="utf-8"))["figures"]["variants"]
    for name, variant in family.items():
        assert isinstance(variant, Known)
        assert list(found[name]["steps"]) == ["1", "4", "28"]
        for steps, row in found[name]["steps"].items():
            assert row["overall"] == pytest.approx(variant.right(int(steps)) / 6)
            assert 0.9 < row["sharpness"] < 1.1
        assert found[name]["straightness"] == pytest.approx(variant.slope**2 * STRAIGHTNESS, rel=1e-5)
        assert found[name]["passes_per_step"] == (2 if name in ("pro", "stochastic") else 1)
    assert list(found["schnell"]["seconds"]) == ["4", "1"]
    with Image.open(figure) as drawn:
        assert {color for _, color in drawn.getcolors(1 << 20) or []} >= set(COLORS.values())


def test_straightness_prompts_come_from_all_categories() -> None:
    prompts = [prompt for prompt in categories() if prompt.category != "words"]
    chosen = evenly(prompts, 64)
    assert len({id(prompt) for prompt in chosen}) == 64
    assert {sum(prompt.category == name for prompt in chosen) for name in (*SIX, "unseen")} == {9, 10}


def test_straightness_is_a_mean_over_prompts_and_elements() -> None:
    """Of a velocity len(text) t, for more prompts than a batch holds: mean len^2 times STRAIGHTNESS."""

    class ByLength(Known):
        def velocity(self, texts: Sequence[str]) -> Velocity:
            lengths = torch.tensor([len(text) for text in texts]).reshape(-1, 1, 1, 1)
            return lambda x, sigma: (lengths * sigma).expand_as(x).to(x)

    prompts = [Prompt("x" * (1 + i), Scene(), "any") for i in range(21)]
    variant = ByLength(None, VARIANTS["pro"])  # type: ignore[arg-type]
    found = straightness_of(variant, prompts, lambda passes: None)
    assert found == pytest.approx(sum((1 + i) ** 2 for i in range(21)) / 21 * STRAIGHTNESS, rel=1e-5)


def test_seconds_are_medians_without_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a fake clock: round n takes steps + n^2 seconds, the first 100 more."""
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)

    class Clocked(Known):
        def png(self, text: str, steps: int, seed: int) -> bytes:
            nonlocal now
            now += steps + seed**2 + 100 * (seed == 0)
            return b""

    family: dict[str, Variant] = {name: Clocked(None, VARIANTS[name]) for name in ("dev", "schnell")}  # type: ignore[arg-type]
    runs = [("dev", 28), ("schnell", 4), ("schnell", 1)]
    found = seconds_of(family, runs, [Prompt("x", Scene(), "any")], 3, lambda passes: None)
    assert found == {("dev", 28): 32.0, ("schnell", 4): 8.0, ("schnell", 1): 5.0}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every variant with random weights, dev with its guidance embedder."""
    models = write_models(tmp_path_factory.mktemp("models"))
    for path in [*models.glob("vae/*"), *models.glob("text_encoders/*")]:
        path.rename(path.with_name(path.name.replace("tiny", "rectiflux-mini")))
    for name in TITLES:
        write_transformer(
            variant_files(models, name).transformer, replace(SPEC, guidance_embed=name == "dev")
        )
    return models


@pytest.mark.parametrize("name", TITLES)
def test_a_timed_image_is_the_scored_one(tiny: Path, name: str) -> None:
    """Guidance, schedule and noise are the same from prompt to PNG as in the scored images."""
    variant = Variant(load_models(variant_files(tiny, name)), VARIANTS[name])
    scored = variant.generate([Prompt("a red star", Scene(), "any")], 3, lambda done: None)
    with Image.open(io.BytesIO(variant.png("a red star", 3, 0))) as image:
        assert image.format == "PNG" and image.size == (128, 128)
        assert np.abs(np.asarray(image).astype(int) - scored[0]).max() <= 1
    assert scored[0].std() > 1


def test_straightness_is_that_of_the_guided_velocity(tiny: Path) -> None:
    """Of pro against Euler steps written out, with both halves of CFG 3.5 computed separately."""
    variant = Variant(load_models(variant_files(tiny, "pro")), VARIANTS["pro"])
    texts = ["a red star", "two blue circle", "green"]
    encode, network = variant.models.text_encoders.encode, variant.models.transformer

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
    found = straightness_of(variant, prompts, lambda passes: None)
    assert expected > 1e-3 and found == pytest.approx(expected, rel=1e-3)


def test_the_whole_from_files(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Random weights score nothing."""
    options = ["--quick", "--steps", "1", "--variants", "schnell", "dev", "--threads", "1"]
    assert main([*options, "--models", str(tiny)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "family schnell@1 0.00"


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--models", str(tmp_path), "--variants", "schnell"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and str(variant_files(tmp_path, "schnell").transformer) in err
