"""The memory case: peaks that a known run takes, a process for each side, and what is skipped."""

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
from rectiflux.benchmarks.speed_memory import SIDES, SUBJECTS, above_weights, apart, memory, peak
from rectiflux.benchmarks.speed_settings import Settings, Skipped, Told

needs_status = pytest.mark.skipif(
    not STATUS.exists(), reason="this system does not tell what a process holds"
)


def settings_of(
    folder: Path, *, quick: bool = True, end: float = float("inf"), large: bool = False
) -> Settings:
    return Settings(quick, 0.0, Clock(), folder, end, large)


@needs_status
def test_the_peak_is_what_a_run_takes_at_most(tmp_path: Path) -> None:
    """Of 256 MB, given back, and then 64."""

    def run() -> None:
        for size in (1 << 26, 1 << 24):
            ballast = torch.ones(size)
            time.sleep(0.05)
            del ballast

    assert peak(run, settings_of(tmp_path)) == pytest.approx(1 << 28, rel=0.1)


@needs_status
@pytest.mark.parametrize("name", ["step-512", "decode-512"])
def test_both_sides_are_built_and_run(tmp_path: Path, name: str) -> None:
    for side in SIDES:
        assert above_weights(name, side, settings_of(tmp_path)) >= 0


def test_the_picture_is_painted_by_both_sides() -> None:
    settings = settings_of(speed.ROOT / "models")
    with torch.no_grad():
        ours, theirs = (SUBJECTS["picture"](side, settings)() for side in SIDES)
    assert float((ours - theirs).abs().max()) < 1e-4


def test_ratios_are_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_memory, "STATUS", tmp_path)
    taken = {"ours": 20_000_000, "theirs": 50_000_000}
    monkeypatch.setattr(speed_memory, "above_weights", lambda name, side, settings: taken[side])
    monkeypatch.setattr(speed_memory, "apart", lambda name, side, settings: taken[side] * 2)
    outcomes = list(memory(settings_of(tmp_path)))
    assert outcomes[0] == Ratio("memory-step-512", 2.5, 2.5, 2.5, 1, 2e7, 5e7, "above the weights", "MB")
    assert isinstance(outcomes[0], Ratio)
    line, last = outcomes[0].lines().splitlines()
    assert line.startswith("memory-step-512: ours      20.00 MB, theirs      50.00 MB (")
    assert last == "ratio memory-step-512 2.500"
    assert outcomes[3] == Skipped("memory-decode-2048", "minutes on a CPU; --large measures it")
    outcomes = list(memory(settings_of(tmp_path, quick=False, large=True)))
    assert outcomes[3] == Told("memory-decode-2048: ours takes 40 MB above the weights")
    taken["ours"] = 0
    assert next(memory(settings_of(tmp_path))) == Skipped("memory-step-512", "too small to see")


def test_what_cannot_be_measured_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late = list(memory(settings_of(tmp_path, end=0.0)))
    assert late == [Skipped(f"memory-{name}", "the time is over") for name in SUBJECTS]
    monkeypatch.setattr(speed_memory, "STATUS", tmp_path / "none")
    assert {one.why for one in memory(settings_of(tmp_path)) if isinstance(one, Skipped)} == {
        "this system does not tell what a process holds"
    }
    monkeypatch.setattr(speed_memory, "STATUS", tmp_path)
    monkeypatch.setattr(speed_memory, "SUBJECTS", {"picture": speed_memory.picture})
    (gap,) = memory(settings_of(tmp_path))
    assert isinstance(gap, Skipped) and "there is no" in gap.why


def test_a_process_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=3, stderr="a warning\nno room\n")
    monkeypatch.setattr(speed_memory, "subprocess", SimpleNamespace(run=lambda *_, **__: failed))
    message = "the process that measured ours ended with 3 and said: no room"
    with pytest.raises(OSError, match=message):
        apart("step-512", "ours", settings_of(tmp_path))


def test_the_process_for_a_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that `apart` gives, run here: its file has what `apart` returns."""

    def run_here(command: list[str], **options: object) -> SimpleNamespace:
        assert speed.main(command[command.index("speed") + 1 :]) == 0
        written = json.loads(Path(command[-1]).read_text())["figures"]
        assert written == {"bytes": 12345}
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(speed_memory, "subprocess", SimpleNamespace(run=run_here))
    monkeypatch.setattr(speed_memory, "above_weights", lambda name, side, settings: 12345)
    assert apart("step-512", "theirs", settings_of(tmp_path)) == 12345
