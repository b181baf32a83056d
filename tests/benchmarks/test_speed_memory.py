"""The memory case of `bench speed`: a known peak, both sides, child processes and what is skipped."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rectiflux.benchmarks import speed, speed_memory
from rectiflux.benchmarks.footprint import STATUS
from rectiflux.benchmarks.interleaved import Clock, Ratio
from rectiflux.benchmarks.speed_memory import SIDES, SUBJECTS, above_weights, in_own_process, memory, peak
from rectiflux.benchmarks.speed_settings import TIME_IS_UP, Note, Settings, Skipped

needs_status = pytest.mark.skipif(not STATUS.exists(), reason="this system has no /proc/self/status")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(True, 0.0, Clock(), tmp_path)


@needs_status
def test_the_peak_of_a_run(settings: Settings) -> None:
    """Of 256 MB, freed, and then 64."""

    def run() -> None:
        for size in (1 << 26, 1 << 24):
            ballast = torch.ones(size)
            time.sleep(0.05)
            del ballast

    assert peak(run, settings) == pytest.approx(1 << 28, rel=0.1)


@needs_status
@pytest.mark.parametrize("name", ["step-512", "decode-512"])
@pytest.mark.parametrize("side", SIDES)
def test_both_sides_run(settings: Settings, name: str, side: str) -> None:
    assert above_weights(name, side, settings) >= 0


def test_both_sides_generate_the_same_image() -> None:
    settings = Settings(True, 0.0, Clock(), speed.ROOT / "models")
    with torch.no_grad():
        ours, theirs = (SUBJECTS["picture"](side, settings)() for side in SIDES)
    assert float((ours - theirs).abs().max()) < 1e-4


def test_ratios_are_of_bytes(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_memory, "STATUS", settings.models)
    peaks = {"ours": 20_000_000, "theirs": 50_000_000}
    monkeypatch.setattr(speed_memory, "above_weights", lambda name, side, settings: peaks[side])
    *ratios, large = memory(settings)
    assert ratios[0] == Ratio("memory-step-512", 2.5, 2.5, 2.5, 1, 2e7, 5e7, "above the weights", "MB")
    assert isinstance(large, Skipped) and "--large" in large.reason
    *_, large = memory(Settings(True, 0.0, Clock(), settings.models, large=True))
    assert isinstance(large, Note) and "20 MB" in large.text
    peaks["ours"] = 0
    assert next(memory(settings)) == Skipped("memory-step-512", "too small to measure")


def test_what_is_skipped(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    late = list(memory(Settings(True, 0.0, Clock(), settings.models, end=0.0)))
    assert late == [Skipped(f"memory-{name}", TIME_IS_UP) for name in SUBJECTS]
    monkeypatch.setattr(speed_memory, "STATUS", settings.models / "none")
    assert all(isinstance(one, Skipped) and "/proc/self/status" in one.reason for one in memory(settings))
    monkeypatch.setattr(speed_memory, "STATUS", settings.models)
    monkeypatch.setattr(speed_memory, "SUBJECTS", {"picture": speed_memory.image})
    (skipped,) = memory(settings)
    assert isinstance(skipped, Skipped) and "rectiflux-mini-dev" in skipped.reason


@pytest.mark.parametrize("fails", [False, True])
def test_a_child_process_for_a_side(settings: Settings, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """The child's command, run here: it writes the bytes that the parent returns."""

    def run_here(command: list[str], **options: object) -> SimpleNamespace:
        if fails:
            return SimpleNamespace(returncode=3, stderr="a warning\nno room\n")
        assert speed.main(command[command.index("speed") + 1 :]) == 0
        assert json.loads(Path(command[-1]).read_text())["figures"] == {"bytes": 12345}
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(speed_memory, "subprocess", SimpleNamespace(run=run_here))
    monkeypatch.setattr(speed_memory, "above_weights", lambda name, side, settings: 12345)
    if fails:
        with pytest.raises(OSError, match="no room"):
            in_own_process("step-512", "theirs", settings)
    else:
        assert in_own_process("step-512", "theirs", settings) == 12345
